"""Download a version from object storage and verify every digest before the version is used.

There are three steps: `inspect` reads the manifest, `fetch_file` downloads one file, `finish` checks the files and
renames the folder. The manifest is read first, because the files need space on the disk. An attempt reuses the bytes
that an earlier attempt left, and reads them again for the digest.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import BinaryIO

from graft.artifacts.layout import split_s3_uri
from graft.artifacts.manifest import ADAPTER_FILES, Effect, Manifest, ManifestFile
from graft.artifacts.sources import CONFIG_LIMITS
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts.agent import WantedAdapter

from graft_server.agent.decisions.decide import OUR_NAME
from graft_server.agent.decisions.reasons import AdapterError, AdapterReason
from graft_server.agent.storage.adapterconfig import reduced_config
from graft_server.agent.storage.folders import EFFECT_FILE, Folders, write
from graft_server.agent.storage.objects import READ_BYTES, Objects, code_of, corrupted, explained, interrupted
from graft_server.agent.storage.weights import check_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROGRESS_BYTES = 1024 * 1024
RESUMES = 3  # limit of resumes in a row that transferred less than PROGRESS_BYTES
PAUSE_SECONDS = (0.1, 0.4)  # before an interrupted transfer resumes


class NotWanted(Exception):
    """The download must stop: the adapter is not wanted now, or another of its files has failed."""


@dataclass(frozen=True)
class Version:
    """The facts from the manifest of a version that may be downloaded."""

    adapter: WantedAdapter
    bucket: str
    prefix: str
    rank: int | None  # None: a tuned prompt
    max_rank: int
    files: tuple[ManifestFile, ...]
    effect: Effect | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


@contextmanager
def _as_adapter_error(what: str) -> Iterator[None]:
    """Convert every error of a step into an AdapterError."""
    try:
        yield
    except InvalidArtifact as error:
        raise AdapterError(AdapterReason(error.reason), str(error)) from error
    except StoreError as error:
        raise explained(error) from error
    except OSError as error:
        full = error.errno in (ENOSPC, EDQUOT)
        reason = AdapterReason.DISK_FULL if full else AdapterReason.DISK_UNAVAILABLE
        raise AdapterError(reason, f"{what}: {error}") from error


def inspect(open_store: Callable[[], Objects], adapter: WantedAdapter, max_rank: int, max_bytes: int) -> Version:
    """Read the manifest and check its digest and the limits. Raises AdapterError if the version cannot be served."""
    if not OUR_NAME.fullmatch(adapter.engine_name):
        raise AdapterError(
            AdapterReason.NAME_INVALID,
            f"the engine name {adapter.engine_name!r} is not of the form <tenant>--<adapter>--<12 hex digits>",
        )
    try:
        bucket, key = split_s3_uri(adapter.uri)
    except ValueError as error:
        raise AdapterError(AdapterReason.URI_INVALID, str(error)) from error
    prefix = key.rstrip("/") + "/"
    with _as_adapter_error("manifest.json"):
        manifest = _manifest(open_store(), prefix, adapter.digest, bucket)
    if manifest.rejected or manifest.method == "full":
        what = "was rejected by its gates" if manifest.rejected else "is a whole model"
        raise AdapterError(AdapterReason.NOT_SERVABLE, f"version {manifest.version} {what}: name another version")
    if manifest.rank is not None and manifest.rank > max_rank:
        raise AdapterError(
            AdapterReason.RANK_TOO_HIGH,
            f"rank {manifest.rank} is above the deployment's limit {max_rank}: raise limits.maxLoraRank",
        )
    # The other files of a version are for people, and for programs that load it without Graft. Engines have the
    # tokenizer of the base model.
    files = tuple(file for file in manifest.files if file.name in ADAPTER_FILES)
    for file in files:
        limit = {CONFIG: CONFIG_LIMITS.size, WEIGHTS: max_bytes}[file.name]
        if file.size > limit:
            raise AdapterError(AdapterReason.TOO_LARGE, f"{file.name} has {file.size} bytes; the limit is {limit}")
    version = Version(adapter, bucket, prefix, manifest.rank, max_rank, files, manifest.effect)
    if version.size_bytes > max_bytes:
        raise AdapterError(
            AdapterReason.TOO_LARGE, f"its files have {version.size_bytes} bytes; the limit is {max_bytes}"
        )
    return version


def _manifest(store: Objects, prefix: str, digest: str, bucket: str) -> Manifest:
    """Return the manifest. If it is invalid, read it once more, because its bytes may have been altered in transit."""
    try:
        return read_manifest(store, prefix, digest, bucket)[0]
    except (InvalidArtifact, StoreError) as error:
        if isinstance(error, StoreError) and not corrupted(error):
            raise
        return read_manifest(store, prefix, digest, bucket)[0]


@dataclass(frozen=True)
class Transferred:
    """Bytes of one file: received by this attempt, and left by an earlier attempt."""

    came: int
    kept: int


def fetch_file(
    open_store: Callable[[], Objects],
    version: Version,
    file: ManifestFile,
    folder: Path,
    still_wanted: Callable[[], bool],
) -> Transferred:
    """Download one file into the folder. Resume where an earlier attempt ended. Raises AdapterError or NotWanted."""
    with _as_adapter_error(file.name):
        transfer = _Transfer(open_store(), version, file, folder / file.name, still_wanted)
        # The second attempt starts from the first byte, because the bytes may have been altered in transit.
        if not transfer.take() and not transfer.take():
            raise InvalidArtifact("DigestMismatch", f"the sha256 of {file.name} is not the one in the manifest")
        return Transferred(transfer.came, transfer.kept)


class _Transfer:
    """The transfer of one file."""

    def __init__(
        self, store: Objects, version: Version, file: ManifestFile, path: Path, still_wanted: Callable[[], bool]
    ) -> None:
        self._store = store
        self._bucket, self._key = version.bucket, version.prefix + file.name
        self._file = file
        self._path = path
        self._still_wanted = still_wanted
        self._hasher, self._size = hashlib.sha256(), 0  # of the bytes on the disk
        self.came = self.kept = 0

    def take(self) -> bool:
        """Download the rest of the file. Return whether its digest is correct.

        If the digest is wrong, the file is deleted, so the next call starts from the first byte.
        """
        with self._path.open("a+b") as stream:
            self._rebuild(stream)
            left = RESUMES
            while self._size < self._file.size:
                before = self._size
                try:
                    self._receive(stream)
                except StoreError as error:
                    if corrupted(error):
                        break  # the digest is wrong, too
                    if not interrupted(error) or left == 0:
                        raise
                    left = RESUMES if self._size - before >= PROGRESS_BYTES else left - 1
                    time.sleep(random.uniform(*PAUSE_SECONDS))  # noqa: S311
            stream.flush()
            os.fsync(stream.fileno())
        if self._hasher.hexdigest() == self._file.sha256:
            return True
        self._path.unlink()
        return False

    def _rebuild(self, stream: BinaryIO) -> None:
        """Reuse the bytes on the disk. They are not trusted: the digest covers them, too."""
        self._hasher, self._size, self.kept = hashlib.sha256(), 0, 0
        there = stream.seek(0, os.SEEK_END)
        if there > self._file.size or self._file.name == CONFIG:  # the config on the disk may be the reduced one
            stream.truncate(0)
            return
        stream.seek(0)
        while self._size < there and (chunk := stream.read(min(READ_BYTES, there - self._size))):
            self._hasher.update(chunk)
            self._size += len(chunk)
        self.kept = self._size

    def _receive(self, stream: BinaryIO) -> None:
        """Append the bytes that the store sends. If this fails, the received bytes stay on the disk."""
        name, size = self._file.name, self._file.size
        try:
            answer = self._store.stream(self._key, self._bucket, self._size)
        except StoreError as error:
            if code_of(error) == "InvalidRange":
                raise InvalidArtifact(
                    "DigestMismatch", f"{name} is shorter than the {size} bytes in the manifest"
                ) from error
            raise
        with closing(answer.chunks):
            if answer.total != size:
                raise InvalidArtifact("DigestMismatch", f"{name} has {answer.total} bytes; the manifest says {size}")
            if answer.start != self._size:  # a store that does not support ranges sends the whole file
                stream.truncate(0)
                self._hasher, self._size, self.kept = hashlib.sha256(), 0, 0
            for chunk in answer.chunks:
                if not self._still_wanted():
                    raise NotWanted(name)
                if self._size + len(chunk) > size:
                    raise InvalidArtifact("DigestMismatch", f"{name} is longer than the {size} bytes in the manifest")
                stream.write(chunk)
                self._hasher.update(chunk)
                self._size += len(chunk)
                self.came += len(chunk)
        if self._size < size:
            raise StoreError("unavailable", f"the transfer of {name} ended after {self._size} of {size} bytes")


def finish(folders: Folders, version: Version) -> None:
    """Check the downloaded files, reduce the config, and rename the folder. Raises AdapterError if a check fails."""
    name = version.adapter.engine_name
    folder = folders.partial(name)
    with _as_adapter_error(name):
        config = reduced_config((folder / CONFIG).read_bytes(), version.rank, version.max_rank)
        check_weights(folder / WEIGHTS, version.max_rank)
        write(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())
        if version.effect is not None:
            write(folder / EFFECT_FILE, version.effect.model_dump_json(by_alias=True).encode())
        folders.finish(name, version.adapter.digest)
