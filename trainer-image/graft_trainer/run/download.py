"""Downloads of the files that a job names, from s3://, hf://datasets/, pvc:// or configMap:// to the work folder.

A dataset file is JSON Lines, plain or compressed with gzip. The download checks that the file can be read, fits on the
disk and has this format.
"""

import gzip
import hashlib
import logging
import shutil
import time
import zlib
from pathlib import Path

from graft.artifacts.layout import split_s3_uri
from graft.artifacts.manifest import PEOPLE_FILES, Manifest
from graft.artifacts.sources import CONFIG_LIMITS, TOKENIZER_LIMITS, SourceError, pvc_path
from graft.artifacts.storage import StoreError
from graft.artifacts.store import CHUNK, Report, S3Store
from graft.artifacts.versions import InvalidArtifact, file_sha256, read_manifest
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure
from graft_trainer.run.settings import Settings

log = logging.getLogger(__name__)
LIMIT = 4 * 1024**3  # bytes of a decompressed file: the work folder is on the node's disk
SPARE = 256 * 1024**2  # bytes that stay free on the disk
MOST_BYTES = {
    "adapter_config.json": CONFIG_LIMITS.size,
    "config.json": CONFIG_LIMITS.size,
    "generation_config.json": CONFIG_LIMITS.size,
    "tokenizer_config.json": TOKENIZER_LIMITS.size,
}
GZIP = b"\x1f\x8b"
OTHER_FORMS = {
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
}  # fmt: skip
OTHER_SUFFIXES = (
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".xlsx",
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".zst",
    ".bz2",
    ".xz",
)


def download_file(
    uri: str,
    target: Path,
    *,
    field: str,
    store: S3Store,
    settings: Settings,
    hf_endpoint: str | None,
    jsonl: bool = True,
) -> str:
    """Copy the file at `uri` to `target` and decompress it. Return the sha256:… digest of the file at `uri`.

    `field` is the field of the spec that names the file, such as dataset.train. Raises Failure if the file does not
    exist, cannot be read, or is too large. If `jsonl` is set, it also raises Failure for a file that is not JSON Lines.
    """
    if jsonl and uri.lower().endswith(OTHER_SUFFIXES):
        raise _other_form(field, uri, f"its name ends in {uri[uri.rindex('.') :]}")
    if uri.endswith("/"):
        raise _missing(field, uri, "it is a folder, but a single file is expected")
    target.parent.mkdir(parents=True, exist_ok=True)
    scheme = uri.partition("://")[0]
    if scheme == "s3":
        digest = _from_s3(uri, target, field, store)
    elif scheme == "hf":
        digest = _from_hub(uri, target, field, settings, hf_endpoint)
    else:
        digest = _from_mount(uri, target, field, settings)
    if jsonl:
        _unpack(target, field, uri)
        _check_form(target, field, uri)
    return digest


def tell(name: str) -> Report:
    """Return a callback that logs the progress of the download `name` every 5 s."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            log.info("%s: %.1f of %.1f MB", name, done / 1e6, total / 1e6)

    return report


def fetch_version(store: S3Store, uri: str, digest: str, folder: Path) -> Manifest:
    """Copy a published version without the files for people to `folder` and verify every digest. Return its manifest.

    Raises InvalidArtifact or StoreError.
    """
    bucket, key = split_s3_uri(uri)
    prefix = key.rstrip("/") + "/"
    manifest, _ = read_manifest(store, prefix, digest, bucket)
    folder.mkdir(parents=True)
    for file in manifest.files:
        if file.name in PEOPLE_FILES:
            continue
        path, stored = folder / file.name, store.head(prefix + file.name, bucket)
        if stored.size != file.size:
            raise InvalidArtifact(
                "DigestMismatch",
                f"{file.name} does not match the manifest: it has {stored.size} bytes, not {file.size}",
            )
        if file.size > (most := MOST_BYTES.get(file.name, file.size)):
            raise InvalidArtifact(
                "ManifestInvalid", f"{file.name} has {file.size} bytes, but it may have at most {most}"
            )
        store.download(stored, path, bucket)
        if (file_sha256(path), path.stat().st_size) != (file.sha256, file.size):
            raise InvalidArtifact("DigestMismatch", f"{file.name} does not match the manifest")
    return manifest


def split_dataset_uri(uri: str) -> tuple[str, str, str]:
    """Return (org/name, revision, path) of hf://datasets/org/name[@revision]/path. A revision refs/a/b has three
    segments.

    Without a revision, it is "main".
    """
    organisation, name, rest = uri.removeprefix("hf://datasets/").split("/", 2)
    name, _, revision = name.partition("@")
    if revision == "refs":
        kind, which, rest = rest.split("/", 2)
        revision = f"refs/{kind}/{which}"
    return f"{organisation}/{name}", revision or "main", rest


def _from_s3(uri: str, target: Path, field: str, store: S3Store) -> str:
    bucket, key = split_s3_uri(uri)
    try:
        item = store.head(key, bucket)
        _check_room(item.size, field, uri, target)
        store.download(item, target, bucket, report=tell(field))
        return "sha256:" + file_sha256(target)
    except StoreError as error:
        if error.trouble in {"missing", "bucket"}:
            raise _missing(field, uri, f"the object does not exist ({error})") from error
        if error.trouble == "denied":
            raise _missing(
                field, uri, f"the key in the Secret graft-storage has no permission to read it ({error})"
            ) from error
        raise


def _from_mount(uri: str, target: Path, field: str, settings: Settings) -> str:
    if uri.startswith("pvc://"):
        try:
            path = pvc_path(uri, settings.pvc_dir)
        except SourceError as error:
            raise _missing(field, uri, str(error)) from error
    elif uri.startswith("configMap://"):
        name, _, key = uri.removeprefix("configMap://").partition("/")
        path = settings.configmap_dir / name / key
    else:
        raise _missing(field, uri, "the URI scheme is unknown")
    try:
        if not path.is_file():
            raise _missing(field, uri, "it is a folder" if path.is_dir() else "the file does not exist")
        size = path.stat().st_size
        _check_room(size, field, uri, target)
        return _copy(path, target, size, field)
    except PermissionError as error:
        raise _missing(field, uri, f"the pod's user has no permission to read it: {error}") from error


def _from_hub(uri: str, target: Path, field: str, settings: Settings, endpoint: str | None) -> str:
    from graft.artifacts.hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo, revision, path = split_dataset_uri(uri)
    place = {"repo_id": repo, "filename": path, "repo_type": "dataset", "revision": revision, "endpoint": endpoint,
             "token": settings.hf_token() or False, "local_dir": settings.work_dir / "hub" / field}  # fmt: skip
    try:
        size = hf_hub_download(**place, dry_run=True).file_size
        _check_room(size, field, uri, target)
        log.info("%s: %.1f MB from the Hub", field, size / 1e6)
        local = Path(hf_hub_download(**place))
    except LocalEntryNotFoundError as error:  # the Hub did not answer, and no local copy exists
        raise _hub_down(field, uri, error) from error
    except EntryNotFoundError as error:
        raise _missing(field, uri, "the repository has no such file at this revision") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status >= 500 or status == 429:
            raise _hub_down(field, uri, error) from error
        raise _missing(field, uri, f"it does not exist, or it needs a token: {error}") from error
    digest = _copy(local, target, size, field)
    local.unlink()
    return digest


def _check_room(size: int, field: str, uri: str, target: Path) -> None:
    if size > LIMIT:
        raise _too_large(field, uri, size)
    free = shutil.disk_usage(target.parent).free
    if size + SPARE > free:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{field}: {uri} has {size / 1e9:.2f} GB, but only {max(0, free - SPARE) / 1e9:.2f} GB fit in the pod's work folder",
            "Set ephemeral-storage in spec.resources.requests of the FineTuneJob above the size of the base model plus the "
            "dataset. Then the pod is scheduled to a node with enough disk space.",
        )


def _copy(path: Path, target: Path, size: int, field: str) -> str:
    hasher, done, report = hashlib.sha256(), 0, tell(field)
    with path.open("rb") as source, target.open("wb") as stream:
        while chunk := source.read(CHUNK):
            hasher.update(chunk)
            stream.write(chunk)
            done += len(chunk)
            report(done, size)
    return "sha256:" + hasher.hexdigest()


def _unpack(target: Path, field: str, uri: str) -> None:
    """Decompress a gzip file in place. Raises Failure if the content is larger than LIMIT or the file is damaged."""
    with target.open("rb") as stream:
        if stream.read(len(GZIP)) != GZIP:
            return
    packed = target.with_name(target.name + ".gz")
    target.replace(packed)
    done = 0
    try:
        with gzip.open(packed) as source, target.open("wb") as sink:
            while chunk := source.read(CHUNK):
                done += len(chunk)
                if done > LIMIT:
                    raise _too_large(field, uri, done)
                sink.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Failure(
            Reason.DATASET_INVALID, f"{field}: {uri} is a damaged gzip file: {error}", "Upload the complete file again."
        ) from error
    finally:
        packed.unlink()


def _check_form(path: Path, field: str, uri: str) -> None:
    with path.open("rb") as stream:
        start = stream.read(64)
    for sign, form in OTHER_FORMS.items():
        if start.startswith(sign):
            raise _other_form(field, uri, f"it is a {form} file")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise Failure(
            Reason.DATASET_INVALID,
            f"{field}: {uri} begins with [, so it is one JSON array. JSON Lines is expected, with one object per line",
            "Convert it with jq -c '.[]' FILE.json > FILE.jsonl.",
        )


def _other_form(field: str, uri: str, why: str) -> Failure:
    return Failure(
        Reason.DATASET_INVALID,
        f"{field}: {uri} is not JSON Lines: {why}",
        "Convert it to JSONL (plain or .gz), for example with datasets.load_dataset(…, split=…).to_json('train.jsonl').",
    )


def _too_large(field: str, uri: str, size: int) -> Failure:
    return Failure(
        Reason.CONFIGURATION_INVALID,
        f"{field}: {uri} has at least {size / 1e9:.2f} GB, but a file may have at most {LIMIT / 1e9:.2f} GB",
        f"Set spec.{field} to a smaller file, for example a sample of this file.",
    )


def _missing(field: str, uri: str, why: str) -> Failure:
    return Failure(
        Reason.DATASET_UNAVAILABLE,
        f"{field}: {uri} cannot be read: {why}",
        f"Upload the file to this URI, or correct the URI in spec.{field}. Check that the job's namespace has permission to read it.",
    )


def _hub_down(field: str, uri: str, error: Exception) -> Failure:
    return Failure(
        Reason.STORAGE_UNAVAILABLE,
        f"{field}: {uri}: the Hugging Face Hub did not answer: {error}",
        "Check that the Hugging Face endpoint is reachable from the job's namespace. The Job retries.",
    )
