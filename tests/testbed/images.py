"""Images: built with buildah from the project's own Dockerfiles, and brought to a node's containerd without a registry.

What a registry's python:3.11-slim is elsewhere is made here with debootstrap. All images go through one OCI folder, where layers that
several share are kept once; only what a node's containerd does not have yet is sent to it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from testbed.node import Node
from testbed.shell import CACHE, REPOSITORY, Failed, locked, output, run, say, step, tail

BASE = "localhost/graft/python:3.11"
BASE_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
LAYOUT = CACHE / "oci"
LOGS = CACHE / "logs"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
CONTEXT = ("operator/graft", "trainer-image", "server-image", "requirements", "operator/Dockerfile", ".dockerignore")


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
        with step("building the base image with debootstrap"):
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
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
        wanted: dict[str, str] = {}
        for tag in tags:
            digest = _push(tag)
            if present.get(tag) != digest:
                wanted[tag] = digest
        if wanted:
            with step(f"loading {', '.join(wanted)}"):
                _send(node, wanted)


def _present(node: Node) -> dict[str, str]:
    """tag -> digest of the manifest, as containerd has it."""
    rows = [line.split() for line in output(node.ctr("images", "ls")).splitlines()[1:]]
    return {row[0]: row[2] for row in rows if len(row) > 2}


def _push(tag: str) -> str:
    """Copy an image into the OCI folder; the digest of its manifest."""
    LAYOUT.mkdir(parents=True, exist_ok=True)
    known = LAYOUT / "pushed.json"
    pushed = dict(json.loads(known.read_text())) if known.exists() else {}
    image = _image_id(tag)
    entry = pushed.get(tag)
    if entry and entry["image"] == image:
        return str(entry["digest"])
    digest_file = LAYOUT / "digest"
    reference = hashlib.sha256(tag.encode()).hexdigest()[:16]
    # Not compressed: it goes no further than this disk.
    run(["buildah", "push", "-q", "--disable-compression", "--digestfile", digest_file, tag, f"oci:{LAYOUT}/layout:{reference}"],
        LOGS / "push.log", f"exporting {tag}")  # fmt: skip
    digest = digest_file.read_text().strip()
    pushed[tag] = {"image": image, "digest": digest}
    known.write_text(json.dumps(pushed, indent=1))
    return digest


def _send(node: Node, wanted: dict[str, str]) -> None:
    """Stream an OCI archive of what containerd lacks into `ctr images import`."""
    blobs = LAYOUT / "layout" / "blobs" / "sha256"
    there = node.images / "io.containerd.content.v1.content" / "blobs" / "sha256"
    needed: dict[str, Path] = {}
    manifests = []
    for tag, digest in wanted.items():
        manifest_file = blobs / digest.removeprefix("sha256:")
        manifest = json.loads(manifest_file.read_text())
        parts = [digest, manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
        for number, part in enumerate(parts):
            name = part.removeprefix("sha256:")
            # The manifest itself always goes along: the import starts from it.
            if number < 2 or not (there / name).exists():
                needed[name] = blobs / name
        manifests.append(
            {
                "mediaType": manifest.get("mediaType", "application/vnd.oci.image.manifest.v1+json"),
                "digest": digest,
                "size": manifest_file.stat().st_size,
                "annotations": {
                    "io.containerd.image.name": tag,
                    "org.opencontainers.image.ref.name": tag.rpartition(":")[2],
                },
            }
        )
    log = LOGS / "import.log"
    say(f"    {sum(path.stat().st_size for path in needed.values()) / 1e6:.0f} MB in {len(needed)} blobs")
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output_:
        index, layout = Path(folder) / "index.json", Path(folder) / "oci-layout"
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        layout.write_text('{"imageLayoutVersion":"1.0.0"}')
        process = subprocess.Popen(
            node.ctr("images", "import", "--local", "-") if _has_local(node) else node.ctr("images", "import", "-"),
            stdin=subprocess.PIPE, stdout=output_, stderr=subprocess.STDOUT, env=dict(os.environ),
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|") as archive:
                archive.add(layout, "oci-layout")
                archive.add(index, "index.json")
                for name, path in needed.items():
                    archive.add(path, f"blobs/sha256/{name}")
            process.stdin.close()
        except BrokenPipeError:
            pass
        if process.wait() != 0:
            raise Failed(f"ctr images import failed; the log is {log}, its end:\n{tail(log)}")


def _has_local(node: Node) -> bool:
    return "--local" in output(node.ctr("images", "import", "--help"), check=False)
