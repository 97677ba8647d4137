"""Bills of materials: what an image contains, as CycloneDX 1.6 in JSON. It reads the image's files and asks no other service."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from uuid import UUID

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from testbed.images import Stored
from testbed.shell import REPOSITORY, Failed, output, step

FOLDER = REPOSITORY / "build" / "sbom"
SITE_PACKAGES = ("opt/venv/lib/python3*/site-packages", "usr/local/lib/python3*/site-packages")
DPKG = ("var/lib/dpkg/status", "var/lib/dpkg/status.d/*")  # the second is of images without dpkg


def write(tags: dict[str, str]) -> list[Path]:
    """Write build/sbom/<name>.cdx.json for every image, and build/sbom/digests.json. Return the paths of the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    digests, written = {}, []
    with step("writing bills of materials to build/sbom"):
        for name, tag in tags.items():
            stored = Stored(tag)
            # A registry that compresses the layers gives the manifest another digest. The id stays the same.
            digests[name] = {"tag": tag, "id": stored.id, "digest": stored.digest}
            path = FOLDER / f"{name}.cdx.json"
            with _mounted(tag) as root:
                path.write_text(document(name, stored.digest, root))
            written.append(path)
    listed = FOLDER / "digests.json"
    listed.write_text(json.dumps(digests, indent=2) + "\n")
    return [*written, listed]


def document(name: str, digest: str, root: Path) -> str:
    """Return the bill of materials of the files below `root`. Raises Failed if it does not conform to CycloneDX 1.6."""
    hexadecimal = digest.removeprefix("sha256:")
    image = Component(
        type=ComponentType.CONTAINER,
        name=f"graft/{name}",
        version=digest,
        bom_ref=f"graft/{name}@{digest}",
        purl=PackageURL("oci", None, name, digest),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hexadecimal)],
    )
    components = list({str(item.purl): item for item in (*_debian(root), *_python(root), *_ours(root))}.values())
    # The same image has the same serial number.
    bom = Bom(components=components, serial_number=UUID(hashlib.sha256(digest.encode()).hexdigest()[:32]))
    bom.metadata.component = image
    bom.register_dependency(image, components)
    text: str = JsonV1Dot6(bom).output_as_string(indent=1)
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise Failed(f"the bill of materials of {name} does not conform to CycloneDX 1.6: {error}")
    return text


@contextlib.contextmanager
def _mounted(tag: str) -> Iterator[Path]:
    container = output(["buildah", "from", "--pull-never", tag]).strip()
    try:
        yield Path(output(["buildah", "mount", container]).strip())
        output(["buildah", "umount", container])
    finally:
        output(["buildah", "rm", container])


def _debian(root: Path) -> Iterator[Component]:
    """The installed Debian packages."""
    release = root / "etc" / "os-release"
    found = re.search(r"^VERSION_CODENAME=(\w+)", release.read_text(), re.M) if release.exists() else None
    distribution = {"distro": found.group(1)} if found else {}
    for path in (file for pattern in DPKG for file in sorted(root.glob(pattern))):
        for paragraph in path.read_text(errors="replace").split("\n\n"):
            fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.M))
            if "Package" in fields and fields.get("Status", "install ok installed").endswith(" installed"):
                qualifiers = {"arch": fields["Architecture"]} | distribution
                yield _component(PackageURL("deb", "debian", fields["Package"], fields["Version"], qualifiers))


def _python(root: Path) -> Iterator[Component]:
    """The installed Python packages."""
    folders = [str(folder) for pattern in SITE_PACKAGES for folder in sorted(root.glob(pattern))]
    for item in distributions(path=folders):
        name = re.sub(r"[-_.]+", "-", item.metadata["Name"]).lower()
        yield _component(PackageURL("pypi", None, name, item.version), _licenses(item))


def _ours(root: Path) -> Iterator[Component]:
    """Our own code. Its version is the one in pyproject.toml."""
    found = re.search(r'^version = "(.*)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    version = found.group(1) if found else None
    for folder in sorted(root.glob("app/graft*")):
        yield _component(PackageURL("generic", "graft", folder.name, version), ["Apache-2.0"])


def _licenses(item: Distribution) -> list[str]:
    """The license that a Python package declares, if it is short. Some packages have the whole text there."""
    fields = [name for name in ("License-Expression", "License") if name in item.metadata]
    declared = [item.metadata[name].strip() for name in fields]
    return [text for text in declared if 0 < len(text) <= 80 and "\n" not in text][:1]


def _component(purl: PackageURL, licenses: Iterable[str] = ()) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=purl.name,
        version=purl.version,
        purl=purl,
        bom_ref=str(purl),
        licenses=[LicenseFactory().make_from_string(text) for text in licenses],
    )
