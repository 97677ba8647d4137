"""Container images: built with buildah from the project's Dockerfiles, and sent to a node's containerd without a registry.

debootstrap makes the base image, which replaces a registry's python:3.11-slim. Only the layers that containerd lacks are sent.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.node import Node
from testbed.shell import CACHE, REPOSITORY, Failed, locked, output, run, say, step, tail, ticking

BASE = "localhost/graft/python:3.11"
BASE_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LARGE = 100_000_000  # bytes; the archive of a larger layer is deleted once its snapshot exists
LOGS = CACHE / "logs"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


@functools.cache
def storage() -> Path:
    """Return the folder of buildah's images: the one of storage.conf, or of the file that CONTAINERS_STORAGE_CONF names."""
    return Path(json.loads(output(["buildah", "info"]))["store"]["GraphRoot"])


def exists(tag: str) -> bool:
    """Return whether buildah has an image."""
    return bool(output(["buildah", "images", "-q", tag], check=False).strip())


def label(tag: str, name: str) -> str:
    """Return a label of an image, or an empty string if the image does not have it."""
    found = output(
        ["buildah", "inspect", "--type", "image", "--format", "{{json .OCIv1.Config.Labels}}", tag], check=False
    )
    try:
        return str((json.loads(found) or {}).get(name, ""))
    except ValueError:
        return ""


def pinned(reference: str) -> str:
    """Return the ID of an image. Pull the image if it does not exist here.

    A Dockerfile that builds on an ID cannot get another image by the same tag.
    """
    if not exists(reference):
        output(["buildah", "pull", "-q", reference])
    return _image_id(reference).removeprefix("sha256:")


def build_base() -> str:
    """Build the base image if it does not exist: Debian with Python, like python:3.11-slim. Return its tag."""
    with locked("images"):
        if exists(BASE):
            return BASE
        with step("building the base image with debootstrap"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
            root = Path(folder) / "root"
            run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root],
                LOGS / "debootstrap.log", "debootstrap")  # fmt: skip
            for waste in (
                "var/cache/apt/archives",
                "var/lib/apt/lists",
                "usr/share/doc",
                "usr/share/man",
                "usr/share/locale",
            ):
                shutil.rmtree(root / waste, ignore_errors=True)
            container = output(["buildah", "from", "scratch"]).strip()
            run(["buildah", "add", "-q", container, root, "/"], LOGS / "base.log", "adding the files of the base image")
            output(["buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "--env", "LANG=C.UTF-8", container])  # fmt: skip
            run(["buildah", "commit", "-q", "--rm", container, BASE], LOGS / "base.log", "committing the base image")
        return BASE


def _inputs(
    dockerfile: Path, sources: tuple[str, ...], base: str, arguments: dict[str, str], target: str | None
) -> str:
    hasher = hashlib.sha256(json.dumps([arguments, target, _image_id(base)]).encode())
    paths = [dockerfile]
    for source in sources:
        root = REPOSITORY / source
        paths += [root] if root.is_file() else sorted(root.rglob("*"))
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            hasher.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def _image_id(tag: str) -> str:
    return output(["buildah", "images", "-q", "--no-trunc", tag]).strip()


def build(
    tag: str,
    dockerfile: str,
    sources: tuple[str, ...],
    *,
    base: str,
    target: str | None = None,
    arguments: dict[str, str] | None = None,
) -> str:
    """Build an image if one of its inputs changed. `sources` are the paths that it copies. Return its tag."""
    file = REPOSITORY / dockerfile
    given = arguments or {}
    inputs = _inputs(file, sources, base, given, target)
    with locked("images"):
        if exists(tag) and label(tag, "graft.inputs") == inputs:
            return tag
        before = _image_id(tag) if exists(tag) else ""
        log = LOGS / f"image-{tag.rpartition('/')[2].replace(':', '-')}.log"
        log.unlink(missing_ok=True)
        cache = CACHE / "uv"
        cache.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = ["buildah", "bud", "--isolation", "chroot", "--layers", "--network", "host", "-f", file, "-t", tag,
                                     "--label", f"graft.inputs={inputs}", "-v", f"{cache}:/root/.cache/uv"]  # fmt: skip
        if CA_BUNDLE.exists():
            command += ["-v", f"{CA_BUNDLE}:{CA_BUNDLE}:ro"]
        if target:
            command += ["--target", target]
        for name, value in given.items():
            command += ["--build-arg", f"{name}={value}"]
        with step(f"building {tag}"):
            run([*command, REPOSITORY], log, f"building {tag}")
        if before and before != _image_id(tag):
            # Otherwise each change of the code leaves layers on the disk. If another image needs it, buildah refuses.
            output(["buildah", "rmi", before], check=False)
        return tag


def scratch(tag: str, program: Path, command: list[str]) -> str:
    """Build an image that contains one static program. Return its tag."""
    inputs = hashlib.sha256(program.read_bytes() + json.dumps(command).encode()).hexdigest()
    with locked("images"):
        if exists(tag) and label(tag, "graft.inputs") == inputs:
            return tag
        container = output(["buildah", "from", "scratch"]).strip()
        output(["buildah", "copy", "-q", container, str(program), command[0]])
        output(
            ["buildah", "config", "--entrypoint", json.dumps(command), "--label", f"graft.inputs={inputs}", container]
        )
        output(["buildah", "commit", "-q", "--rm", container, tag])
    return tag


def load_scratch(node: Node, tag: str, program: Path, command: list[str]) -> None:
    """Build an image that contains one static program, and send it to a node."""
    load(node, [scratch(tag, program, command)])


def load(node: Node, tags: list[str]) -> None:
    """Send images to a node's containerd, except those that it has."""
    present, unpacked = _present(node), _unpacked(node)
    with locked("images"):
        images = {tag: Stored(tag) for tag in tags}
        # An import that failed leaves an image without its layers.
        wanted = {
            tag: image
            for tag, image in images.items()
            if present.get(tag) != image.digest or any(_lacking(image, unpacked))
        }
        if wanted:
            with step(f"loading {', '.join(wanted)}"), _kept(node, wanted, unpacked):
                _send(node, wanted, unpacked)


def _present(node: Node) -> dict[str, str]:
    """Return the images that containerd has: tag -> digest of the manifest."""
    rows = [line.split() for line in output(node.ctr("images", "ls")).splitlines()[1:]]
    return {row[0]: row[2] for row in rows if len(row) > 2}


class Stored:
    """An image in buildah's storage, described as an OCI image with uncompressed layers.

    The layers are exported one by one. `buildah push` would write every layer again at each change, also the 6 GB of torch.
    """

    def __init__(self, tag: str) -> None:
        image = _image_id(tag).removeprefix("sha256:")
        folder = storage() / "overlay-images" / image
        name = base64.b64encode(f"sha256:{image}".encode()).decode()
        self.config = (folder / f"={name}").read_bytes()
        self.id = _digest(self.config)
        images = json.loads((storage() / "overlay-images" / "images.json").read_text())
        layers = {item["id"]: item for item in json.loads((storage() / "overlay-layers" / "layers.json").read_text())}
        self.layers: list[dict[str, Any]] = []  # lowest first
        layer = next(item["layer"] for item in images if item["id"] == image)
        while layer:
            self.layers.insert(0, layers[layer])
            layer = layers[layer].get("parent")
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": _digest(self.config),
                    "size": len(self.config),
                },
                "layers": [
                    {
                        "mediaType": "application/vnd.oci.image.layer.v1.tar",
                        "digest": item["diff-digest"],
                        "size": item["diff-size"],
                    }
                    for item in self.layers
                ],
            }
        ).encode()
        self.digest = _digest(self.manifest)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _send(node: Node, wanted: dict[str, Stored], unpacked: set[str]) -> None:
    """Stream an OCI archive of the layers that containerd lacks into `ctr images import`.

    Once a large layer is unpacked, its archive is deleted from containerd's content. Containers run from the snapshot, and
    the archive would take the same disk space again.
    """
    needed = {digest: item for stored in wanted.values() for digest, item in _lacking(stored, unpacked)}
    say(f"    {sum(item['diff-size'] for item in needed.values()) / 1e6:.0f} MB in {len(needed)} layers to send")
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE, "digest": stored.digest, "size": len(stored.manifest),
                "annotations": {"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag.rpartition(":")[2]},
            }
            for tag, stored in wanted.items()
        ],
    }  # fmt: skip
    log = LOGS / "import.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            node.ctr("images", "import", "-"),
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), tarfile.open(fileobj=process.stdin, mode="w|") as archive:
            _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            _add(archive, "index.json", json.dumps(index).encode())
            for stored in wanted.values():
                _add(archive, f"blobs/sha256/{stored.digest.removeprefix('sha256:')}", stored.manifest)
                _add(archive, f"blobs/sha256/{_digest(stored.config).removeprefix('sha256:')}", stored.config)
            for digest, item in needed.items():
                _add_layer(archive, digest, item)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with ticking("containerd is unpacking the layers"):
            code = process.wait()
        if code != 0:
            raise Failed(f"ctr images import failed. The log is {log}. Its last lines:\n{tail(log)}")
    for digest, item in needed.items():
        if item["diff-size"] > LARGE:
            output(node.ctr("content", "rm", digest))


@contextlib.contextmanager
def _kept(node: Node, wanted: dict[str, Stored], unpacked: set[str]) -> Iterator[None]:
    """Keep the wanted images' layers that containerd has during the block.

    An import moves the tags first. Until it has unpacked the new images, nothing refers to the layers that they share with
    the old ones, and containerd may delete them.
    """
    kept = {chain for stored in wanted.values() for chain, _ in _chains(stored) if chain in unpacked}
    try:
        for chain in kept:
            output(node.ctr("snapshots", "label", chain, "containerd.io/gc.root=graft"))
        yield
    finally:
        for chain in kept:
            output(node.ctr("snapshots", "label", chain, "containerd.io/gc.root="), check=False)


def _unpacked(node: Node) -> set[str]:
    """Return the chain ids of the layers that containerd has unpacked now.

    It is asked each time: when a tag moves to another image, containerd deletes the snapshots of the old one.
    """
    listed = output(node.ctr("snapshots", "ls")).splitlines()
    return {line.split()[0] for line in listed if line.startswith("sha256:")}


def _lacking(stored: Stored, unpacked: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (digest, layer) of an image's layers that are not unpacked."""
    for chain, item in _chains(stored):
        if chain not in unpacked:
            yield item["diff-digest"], item


def _chains(stored: Stored) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (chain id, layer) of an image's layers, lowest first.

    A snapshot is named by its chain id: https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
    """
    chain = ""
    for item in stored.layers:
        chain = _digest(f"{chain} {item['diff-digest']}".encode()) if chain else item["diff-digest"]
        yield chain, item


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _add_layer(archive: tarfile.TarFile, digest: str, item: dict[str, Any]) -> None:
    """Add one layer to the archive. Raises Failed if its content does not match its digest."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        path = Path(folder) / "layer.tar"
        run(
            ["containers-storage", "diff", "-u", "-f", path, item["id"]],
            LOGS / "layers.log",
            f"exporting {item['diff-size'] / 1e6:.0f} MB",
        )
        hasher = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                hasher.update(chunk)
        if f"sha256:{hasher.hexdigest()}" != digest:
            raise Failed(
                f"layer {item['id']} has digest sha256:{hasher.hexdigest()} after its export, expected {digest}"
            )
        with ticking(f"sending {item['diff-size'] / 1e6:.0f} MB to containerd"):
            archive.add(path, f"blobs/sha256/{digest.removeprefix('sha256:')}")
    # containers-storage leaves a bind mount of the storage on itself.
    mounted = str(storage() / "overlay")
    if any(line.split()[1] == mounted for line in Path("/proc/mounts").read_text().splitlines()):
        output(["umount", mounted], check=False)
