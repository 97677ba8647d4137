"""Bringing a version from object storage into its place, believed only after every digest was compared.

Two steps, because the second needs room on the disk: `inspect` reads the manifest, `fetch` the files. Nothing that either of
them did is needed to go on: an attempt takes over the bytes that an earlier one left, and reads them again for the digest.
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
from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.store import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts.agent import WantedAdapter

from graft_server.agent.decisions.decide import OUR_NAME
from graft_server.agent.decisions.reasons import AdapterError, AdapterReason
from graft_server.agent.storage.adapterconfig import check_tokenizer_config, reduced_config
from graft_server.agent.storage.folders import Folders, write
from graft_server.agent.storage.objects import READ_BYTES, Objects, code_of, corrupted, explained, interrupted
from graft_server.agent.storage.weights import check_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# The rest of a version is for people, or for engines that serve a whole model.
NEEDED = frozenset(
    {
        CONFIG,
        WEIGHTS,
        TOKENIZER_CONFIG,
        "tokenizer.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "spiece.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }
)
CONFIG_LIMIT = 1024 * 1024
OTHER_LIMIT = 64 * 1024 * 1024  # a tokenizer of 250,000 tokens has 20 MB
PROGRESS_BYTES = 1024 * 1024
RESUMES = 3  # in a row that brought less than PROGRESS_BYTES
PAUSE_SECONDS = (0.1, 0.4)  # before a transfer that broke off goes on


class NotWanted(Exception):
    """The adapter was taken from the wanted ones while it was on its way."""


@dataclass(frozen=True)
class Version:
    """What its manifest says of a version that may be fetched."""

    adapter: WantedAdapter
    bucket: str
    prefix: str
    rank: int | None  # None: a tuned prompt
    max_rank: int
    files: tuple[ManifestFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Every error of a step as an AdapterError."""
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
    """Read the manifest, compare its digest and the limits. AdapterError says what is wrong with the version."""
    if not OUR_NAME.fullmatch(adapter.engine_name):
        raise AdapterError(AdapterReason.NAME_INVALID, f"{adapter.engine_name!r} is no adapter name of ours")
    try:
        bucket, key = split_s3_uri(adapter.uri)
    except ValueError as error:
        raise AdapterError(AdapterReason.URI_INVALID, str(error)) from error
    prefix = key.rstrip("/") + "/"
    with _told("manifest.json"):
        manifest = _manifest(open_store(), prefix, adapter.digest, bucket)
    if manifest.rejected or manifest.method == "full":
        what = "was rejected by its gates" if manifest.rejected else "is a whole model"
        raise AdapterError(AdapterReason.NOT_SERVABLE, f"version {manifest.version} {what}: no adapter to load")
    if manifest.rank is not None and manifest.rank > max_rank:
        raise AdapterError(
            AdapterReason.RANK_TOO_HIGH,
            f"rank {manifest.rank} is above the deployment's maxLoraRank {max_rank}: raise limits.maxLoraRank",
        )
    files = tuple(file for file in manifest.files if file.name in NEEDED)
    for file in files:
        limit = {CONFIG: CONFIG_LIMIT, TOKENIZER_CONFIG: CONFIG_LIMIT, WEIGHTS: max_bytes}.get(file.name, OTHER_LIMIT)
        if file.size > limit:
            raise AdapterError(AdapterReason.TOO_LARGE, f"{file.name} has {file.size} bytes; the limit is {limit}")
    version = Version(adapter, bucket, prefix, manifest.rank, max_rank, files)
    if version.size_bytes > max_bytes:
        raise AdapterError(
            AdapterReason.TOO_LARGE, f"its files have {version.size_bytes} bytes; the limit is {max_bytes}"
        )
    return version


def _manifest(store: Objects, prefix: str, digest: str, bucket: str) -> Manifest:
    """Read twice where it is not as it should be: bytes that were changed on the way are no fault of the version's."""
    try:
        return read_manifest(store, prefix, digest, bucket)[0]
    except (InvalidArtifact, StoreError) as error:
        if isinstance(error, StoreError) and not corrupted(error):
            raise
        return read_manifest(store, prefix, digest, bucket)[0]


@dataclass(frozen=True)
class Transferred:
    """Bytes of one file that came now, and that an earlier attempt had left."""

    came: int
    kept: int


def fetch_file(
    open_store: Callable[[], Objects],
    version: Version,
    file: ManifestFile,
    folder: Path,
    still_wanted: Callable[[], bool],
) -> Transferred:
    """Bring one file into the folder, from where an earlier attempt ended. AdapterError, or NotWanted."""
    with _told(file.name):
        transfer = _Transfer(open_store(), version, file, folder / file.name, still_wanted)
        if (
            not transfer.take() and not transfer.take()
        ):  # once more, from its first byte: what changed on the way is no fault
            raise InvalidArtifact("DigestMismatch", f"{file.name} has another sha256 than its manifest says")
        return Transferred(transfer.came, transfer.kept)


class _Transfer:
    """One file on its way."""

    def __init__(
        self, store: Objects, version: Version, file: ManifestFile, path: Path, still_wanted: Callable[[], bool]
    ) -> None:
        self._store = store
        self._bucket, self._key = version.bucket, version.prefix + file.name
        self._file = file
        self._path = path
        self._still_wanted = still_wanted
        self._hasher, self._size = hashlib.sha256(), 0  # of what is on the disk
        self.came = self.kept = 0

    def take(self) -> bool:
        """Whether the whole file is there and is what it should be. If not, it is gone, and taking it again starts anew."""
        with self._path.open("a+b") as stream:
            self._rebuild(stream)
            left = RESUMES
            while self._size < self._file.size:
                before = self._size
                try:
                    self._receive(stream)
                except StoreError as error:
                    if corrupted(error):
                        break  # the digest will say so, too
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
        """Take over what is on the disk, which is believed no more than what comes: the digest at the end is of both."""
        self._hasher, self._size, self.kept = hashlib.sha256(), 0, 0
        there = stream.seek(0, os.SEEK_END)
        if there > self._file.size or self._file.name == CONFIG:  # which may be the reduced one already
            stream.truncate(0)
            return
        stream.seek(0)
        while self._size < there and (chunk := stream.read(min(READ_BYTES, there - self._size))):
            self._hasher.update(chunk)
            self._size += len(chunk)
        self.kept = self._size

    def _receive(self, stream: BinaryIO) -> None:
        """Append what the store sends. What has come stays, however this ends."""
        name, size = self._file.name, self._file.size
        try:
            answer = self._store.stream(self._key, self._bucket, self._size)
        except StoreError as error:
            if code_of(error) == "InvalidRange":
                raise InvalidArtifact(
                    "DigestMismatch", f"{name} is shorter than its manifest's {size} bytes"
                ) from error
            raise
        with closing(answer.chunks):
            if answer.total != size:
                raise InvalidArtifact("DigestMismatch", f"{name} has {answer.total} bytes; its manifest says {size}")
            if answer.start != self._size:  # a store without ranges sends it from the start
                stream.truncate(0)
                self._hasher, self._size, self.kept = hashlib.sha256(), 0, 0
            for chunk in answer.chunks:
                if not self._still_wanted():
                    raise NotWanted(name)
                if self._size + len(chunk) > size:
                    raise InvalidArtifact("DigestMismatch", f"{name} is longer than its manifest's {size} bytes")
                stream.write(chunk)
                self._hasher.update(chunk)
                self._size += len(chunk)
                self.came += len(chunk)
        if self._size < size:
            raise StoreError("unavailable", f"{name} was cut short: {self._size} of {size} bytes are there")


def finish(folders: Folders, version: Version) -> None:
    """Check what was fetched, reduce its config, and give it its place. AdapterError says what may not be served."""
    name = version.adapter.engine_name
    folder = folders.partial(name)
    with _told(name):
        config = reduced_config((folder / CONFIG).read_bytes(), version.rank, version.max_rank)
        if (folder / TOKENIZER_CONFIG).exists():
            check_tokenizer_config((folder / TOKENIZER_CONFIG).read_bytes())
        check_weights(folder / WEIGHTS, version.max_rank)
        write(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())
        folders.finish(name, version.adapter.digest)
