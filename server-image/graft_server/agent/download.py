"""Bringing a version from object storage into its place, believed only after every digest was compared.

A folder below the adapters' directory is either complete and verified, or its name starts with .partial-: it is renamed
into place after everything in it has reached the disk.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from graft.artifacts.layout import split_s3_uri
from graft.artifacts.manifest import ManifestFile
from graft.artifacts.store import S3Store, StorageConfig, StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts import WantedAdapter

from graft_server.agent.adapterconfig import ConfigRejected, check_tokenizer_config, reduced_config
from graft_server.agent.decide import OUR_NAME

PARTIAL = ".partial-"
DIGEST_FILE = "manifest.digest"  # the digest that the folder was verified against
CONFIG_LIMIT = 1024 * 1024
TOKENIZER_CONFIG = "tokenizer_config.json"


class AdapterError(Exception):
    """An adapter that cannot be had now. `permanent`: no retry will help until someone changes something."""

    def __init__(self, reason: str, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.permanent = permanent


class NotWanted(Exception):
    """The adapter was taken from the wanted ones while it was on its way."""


@dataclass(frozen=True)
class OnDisk:
    """A complete folder."""

    digest: str
    size_bytes: int


class Storage:
    """The store that the mounted Secret describes. The Secret may change under a running pod, so it is read each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[StorageConfig, S3Store] | None = None

    def __call__(self) -> S3Store:
        config = StorageConfig.from_dir(self._folder)
        if self._open is None or self._open[0] != config:
            self._open = (config, S3Store(config, attempts=3))
        return self._open[1]


def fetch_adapter(
    open_store: Callable[[], S3Store],
    adapter: WantedAdapter,
    max_rank: int,
    adapters_dir: Path,
    still_wanted: Callable[[], bool] = lambda: True,
) -> OnDisk:
    """Download and verify a version and put it at adapters_dir/<engine name>. AdapterError says what is wrong with it."""
    if not OUR_NAME.fullmatch(adapter.engine_name):
        raise AdapterError("NameInvalid", f"{adapter.engine_name!r} is no adapter name of ours", permanent=True)
    partial: Path | None = None
    try:
        bucket, key = split_s3_uri(adapter.uri)
        prefix = key.rstrip("/") + "/"
        store = open_store()
        manifest, _ = read_manifest(store, prefix, adapter.digest, bucket)
        if manifest.rank is None or manifest.rejected:
            what = "was rejected by its gates" if manifest.rejected else f"was tuned by {manifest.method}"
            raise AdapterError(
                "NotServable", f"version {manifest.version} {what}: no low-rank update to load", permanent=True
            )
        if manifest.rank > max_rank:
            raise AdapterError(
                "RankTooHigh", f"rank {manifest.rank} is above the deployment's maxLoraRank {max_rank}", permanent=True
            )
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{adapter.engine_name}-", dir=adapters_dir))
        partial.chmod(0o755)  # the engine runs as another user
        for file in manifest.files:
            _fetch_file(store, bucket, prefix, file, partial / file.name, still_wanted)
        _check_configs(partial, manifest.rank, max_rank)
        _write(partial / DIGEST_FILE, adapter.digest.encode())
        _sync(partial)
        target = adapters_dir / adapter.engine_name
        shutil.rmtree(target, ignore_errors=True)  # a folder of another digest
        partial.rename(target)
        _sync(adapters_dir)
        return OnDisk(adapter.digest, manifest.size_bytes)
    except InvalidArtifact as error:
        raise AdapterError(error.reason, str(error), permanent=True) from error
    except ConfigRejected as error:
        raise AdapterError("ConfigInvalid", str(error), permanent=True) from error
    except StoreError as error:
        raise _from_store(error) from error
    except OSError as error:
        raise AdapterError("DiskUnavailable", f"{adapters_dir}: {error}", permanent=False) from error
    except ValueError as error:
        raise AdapterError("UriInvalid", str(error), permanent=True) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _from_store(error: StoreError) -> AdapterError:
    if error.trouble == "missing":
        return AdapterError("FileMissing", f"not in storage: {error}", permanent=True)
    if error.trouble == "denied":
        return AdapterError("StorageDenied", str(error), permanent=True)
    return AdapterError("StorageUnavailable", str(error), permanent=False)


def _fetch_file(
    store: S3Store, bucket: str, prefix: str, file: ManifestFile, path: Path, still_wanted: Callable[[], bool]
) -> None:
    there = store.head(prefix + file.name, bucket)
    if there.size != file.size:
        raise InvalidArtifact("DigestMismatch", f"{file.name} has {there.size} bytes; the manifest says {file.size}")
    hasher, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for chunk in store.chunks(prefix + file.name, bucket):
            if not still_wanted():
                raise NotWanted(file.name)
            size += len(chunk)
            if size > file.size:
                raise InvalidArtifact(
                    "DigestMismatch", f"{file.name} is longer than the {file.size} bytes it should be"
                )
            hasher.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    if size < file.size:
        raise StoreError("unavailable", f"{file.name} was cut short: {size} of {file.size} bytes arrived")
    if (actual := hasher.hexdigest()) != file.sha256:
        raise InvalidArtifact("DigestMismatch", f"{file.name} has sha256 {actual}; the manifest says {file.sha256}")


def _check_configs(folder: Path, rank: int, max_rank: int) -> None:
    """Replace adapter_config.json by its known keys; refuse what names code."""
    path = folder / "adapter_config.json"
    config = reduced_config(_small(path), rank, max_rank)
    _write(path, json.dumps(config, indent=1, sort_keys=True).encode())
    if (folder / TOKENIZER_CONFIG).exists():
        check_tokenizer_config(_small(folder / TOKENIZER_CONFIG))


def _small(path: Path) -> bytes:
    if path.stat().st_size > CONFIG_LIMIT:
        raise ConfigRejected(f"{path.name} is larger than {CONFIG_LIMIT} bytes")
    return path.read_bytes()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete_folders(adapters_dir: Path) -> dict[str, OnDisk]:
    """What is in its place, by engine name."""
    found = {}
    for folder in adapters_dir.iterdir():
        if not OUR_NAME.fullmatch(folder.name):
            continue
        with suppress(FileNotFoundError):  # one that a thread is replacing, or that is not complete
            digest = (folder / DIGEST_FILE).read_text().strip()
            found[folder.name] = OnDisk(digest, sum(file.stat().st_size for file in folder.iterdir()))
    return found


def delete_adapter(adapters_dir: Path, name: str) -> None:
    """Remove an adapter's files; first its name, so that a crash in between leaves a .partial- folder."""
    target = adapters_dir / name
    grave = adapters_dir / f"{PARTIAL}deleted-{name}"
    shutil.rmtree(grave, ignore_errors=True)
    if target.exists():
        target.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def clean_partials(adapters_dir: Path) -> list[str]:
    """Remove what a run that was killed left behind; the names of the folders. Only before anything is downloading."""
    leftovers = [folder for folder in adapters_dir.iterdir() if folder.name.startswith(PARTIAL)]
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(folder.name for folder in leftovers)
