"""Images: built with buildah from the project's own Dockerfiles, and brought to a node's containerd without a registry.

What a registry's python:3.11-slim is elsewhere is made here with debootstrap. Only layers that
a node's containerd does not have yet are sent to it.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from testbed.node import Node
from testbed.shell import CACHE, REPOSITORY, Failed, locked, output, run, say, step, tail, ticking

BASE = "localhost/graft/python:3.11"
BASE_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
STORAGE = Path("/var/lib/containers/storage")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LARGE = 100_000_000  # bytes; archives of such layers are not kept beside their snapshot
LOGS = CACHE / "logs"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def exists(tag: str) -> bool:
    """Whether buildah has an image."""
    return bool(output(["buildah", "images", "-q", tag], check=False).strip())


def label(tag: str, name: str) -> str:
    """A label of an image, empty when there is none."""
    found = output(
        ["buildah", "inspect", "--type", "image", "--format", "{{json .OCIv1.Config.Labels}}", tag], check=False
    )
    try:
        return str((json.loads(found) or {}).get(name, ""))
    except ValueError:
        return ""


def build_base() -> str:
    """Debian with Python, as python:3.11-slim has it; kept."""
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
            run(["buildah", "add", "-q", container, root, "/"], LOGS / "base.log", "adding the base's files")
            output(["buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "--env", "LANG=C.UTF-8", container])  # fmt: skip
            run(["buildah", "commit", "-q", "--rm", container, BASE], LOGS / "base.log", "committing the base")
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
    """Build an image unless nothing that goes into it changed. `sources` are the paths it copies."""
    file = REPOSITORY / dockerfile
    given = arguments or {}
    inputs = _inputs(file, sources, base, given, target)
    with locked("images"):
        if exists(tag) and label(tag, "graft.inputs") == inputs:
            return tag
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
        return tag


def scratch(tag: str, program: Path, command: list[str]) -> str:
    """An image of one static program."""
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
    """Build such an image and bring it to a node."""
    load(node, [scratch(tag, program, command)])


def load(node: Node, tags: list[str]) -> None:
    """Bring images to a node's containerd; those that it has are skipped."""
    present = _present(node)
    with locked("images"):
        wanted = {tag: stored for tag in tags if present.get(tag) != (stored := Stored(tag)).digest}
        if wanted:
            with step(f"loading {', '.join(wanted)}"):
                _send(node, wanted)


def _present(node: Node) -> dict[str, str]:
    """tag -> digest of the manifest, as containerd has it."""
    rows = [line.split() for line in output(node.ctr("images", "ls")).splitlines()[1:]]
    return {row[0]: row[2] for row in rows if len(row) > 2}


class Stored:
    """An image as buildah's storage holds it, described as an OCI image of uncompressed layers.

    `buildah push` would write every layer anew at each change, the 6 GB of torch included; layers are exported one by one instead.
    """

    def __init__(self, tag: str) -> None:
        image = _image_id(tag).removeprefix("sha256:")
        folder = STORAGE / "overlay-images" / image
        name = base64.b64encode(f"sha256:{image}".encode()).decode()
        self.config = (folder / f"={name}").read_bytes()
        images = json.loads((STORAGE / "overlay-images" / "images.json").read_text())
        layers = {item["id"]: item for item in json.loads((STORAGE / "overlay-layers" / "layers.json").read_text())}
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


def _send(node: Node, wanted: dict[str, Stored]) -> None:
    """Stream an OCI archive of what containerd lacks into `ctr images import`.

    Once a large layer is unpacked its archive is dropped from containerd's content: the snapshot is what containers run from, and
    the archive would only take the same space again.
    """
    record = node.images / "unpacked.json"
    unpacked = set(json.loads(record.read_text())) if record.exists() else set()
    layers = {item["diff-digest"]: item for stored in wanted.values() for item in stored.layers}
    needed = {digest: item for digest, item in layers.items() if digest not in unpacked}
    say(f"    {sum(item['diff-size'] for item in needed.values()) / 1e6:.0f} MB in {len(needed)} layers")
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
        with ticking("containerd unpacks the layers"):
            code = process.wait()
        if code != 0:
            raise Failed(f"ctr images import failed; the log is {log}, its end:\n{tail(log)}")
    record.write_text(json.dumps(sorted(unpacked | set(layers))))
    for digest, item in needed.items():
        if item["diff-size"] > LARGE:
            output(node.ctr("content", "rm", digest))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _add_layer(archive: tarfile.TarFile, digest: str, item: dict[str, Any]) -> None:
    """One layer, exactly as its digest says."""
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
            raise Failed(f"layer {item['id']} was exported as sha256:{hasher.hexdigest()}, expected {digest}")
        with ticking(f"handing {item['diff-size'] / 1e6:.0f} MB to containerd"):
            archive.add(path, f"blobs/sha256/{digest.removeprefix('sha256:')}")
    # containers-storage leaves its own bind mount on the storage.
    if any(line.split()[1] == str(STORAGE / "overlay") for line in Path("/proc/mounts").read_text().splitlines()):
        output(["umount", str(STORAGE / "overlay")], check=False)
