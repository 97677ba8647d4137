"""Compress unused versions: each safetensors file becomes <name>.xz beside the manifest. The manifest does not change.

A file is always in storage as the original, as its compressed copy, or as both, even if the process is killed. A copy
is read back, decompressed and compared with the manifest's SHA-256 before the original is deleted. `restore` works the
same way in reverse. All data is streamed: memory is bounded by one part of an upload and by xz's window. Every call may
be repeated; it then continues with the remaining files.

The format is plain .xz (`xz -d` reads it). Weights are nearly random bytes, except for sign and exponent. So the
coder's options lp and pb state that a value has two or four bytes. The coder then keeps statistics for each byte of a
value. No other option reduces the size of weights.
"""

import hashlib
import lzma
from collections.abc import Callable, Iterator

from graft.artifacts.listing import listing
from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.storage import StoreError
from graft.artifacts.store import CHUNK, S3Store
from graft.artifacts.versions import InvalidArtifact

SUFFIX = ".xz"
# Weights contain no repeated sequences. So the match search is as short as the coder allows: the same size in a fifth
# of the time.
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "lc": 2, "lp": 2, "pb": 2, "dict_size": 65536}
    | {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC3, "nice_len": 8, "depth": 1}
]
Stopped = Callable[[], bool]


class Interrupted(Exception):
    """The caller no longer wants the result: `stopped` returned True."""


def weights(manifest: Manifest) -> list[ManifestFile]:
    """Return the files that are worth compressing."""
    return [file for file in manifest.files if file.name.endswith(".safetensors")]


def compress(store: S3Store, prefix: str, manifest: Manifest, stopped: Stopped) -> int:
    """Make and verify a compressed copy of each safetensors file that has none. Return the bytes of all copies.

    The originals stay. Raises InvalidArtifact if an original is missing or differs from the manifest.
    """
    there = {item.key: item.size for item in listing(store, prefix)}
    for file in weights(manifest):
        key = prefix + file.name
        if key + SUFFIX in there and _holds(store, key, file, stopped):
            continue
        if key not in there:
            raise InvalidArtifact("FileMissing", f"{file.name} is not in storage, and it has no valid compressed copy")
        expected = _Sum(file)
        _upload(store, key + SUFFIX, _compressed(expected.following(store.chunks(key))), stopped)
        if not expected.met:
            raise InvalidArtifact("DigestMismatch", f"{file.name} differs from the manifest")
        if not _holds(store, key, file, stopped):
            raise StoreError("unavailable", f"{key + SUFFIX}: the data read back differs from the data written")
    copies = {prefix + file.name + SUFFIX for file in weights(manifest)}
    return sum(item.size for item in listing(store, prefix) if item.key in copies)


def drop_originals(store: S3Store, prefix: str, manifest: Manifest) -> None:
    """Delete the originals whose copies `compress` has just verified."""
    for file in weights(manifest):
        store.delete(prefix + file.name)


def restore(store: S3Store, prefix: str, manifest: Manifest, stopped: Stopped) -> None:
    """Make and verify each original again, then delete its copy. Raises InvalidArtifact if a copy is invalid."""
    there = {item.key for item in listing(store, prefix)}
    for file in weights(manifest):
        key = prefix + file.name
        if key + SUFFIX not in there:
            continue  # already restored; every program that loads the version verifies it
        if key not in there or store.sha256(key) != (file.sha256, file.size):
            expected = _Sum(file)
            _upload(store, key, expected.following(decompressed(store, key, file)), stopped)
            if store.sha256(key) != (file.sha256, file.size):
                raise StoreError("unavailable", f"{key}: the data read back differs from the data written")
        store.delete(key + SUFFIX)


def is_archived(store: S3Store, prefix: str, manifest: Manifest) -> bool:
    """Return whether at least one file is missing and every missing file has a compressed copy."""
    there = {item.key.removeprefix(prefix) for item in listing(store, prefix)}
    missing = [file.name for file in manifest.files if file.name not in there]
    return bool(missing) and all(name + SUFFIX in there for name in missing)


def verify(store: S3Store, prefix: str, manifest: Manifest) -> None:
    """Compare every file with the manifest, a compressed file by its decompressed bytes.

    Raises InvalidArtifact at a difference.
    """
    there = {item.key for item in listing(store, prefix)}
    for file in manifest.files:
        key = prefix + file.name
        if key not in there and key + SUFFIX not in there:
            raise InvalidArtifact("FileMissing", f"{file.name} is not in storage")
        chunks = store.chunks(key) if key in there else decompressed(store, key, file)
        for _ in _Sum(file).following(chunks):
            pass


def leftovers(store: S3Store, prefix: str, manifest: Manifest) -> bool:
    """Return whether a file has both an original and a copy: a process was killed before it deleted one of them."""
    there = {item.key.removeprefix(prefix) for item in listing(store, prefix)}
    return any(file.name in there and file.name + SUFFIX in there for file in weights(manifest))


class _Sum:
    """The SHA-256 and the size of a stream of bytes, to be compared with the manifest's."""

    def __init__(self, file: ManifestFile) -> None:
        self._file, self._hasher, self._size = file, hashlib.sha256(), 0

    def following(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._hasher.update(chunk)
            self._size += len(chunk)
            yield chunk
        if not self.met:
            raise InvalidArtifact(
                "DigestMismatch",
                f"{self._file.name} has {self._size} bytes, sha256 {self._hasher.hexdigest()}; the manifest says "
                f"{self._file.size}, {self._file.sha256}",
            )

    @property
    def met(self) -> bool:
        return (self._hasher.hexdigest(), self._size) == (self._file.sha256, self._file.size)


def _compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    coder = lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=FILTERS)
    for chunk in chunks:
        yield coder.compress(chunk)
    yield coder.flush()


def decompressed(store: S3Store, key: str, file: ManifestFile) -> Iterator[bytes]:
    """Yield the decompressed bytes of a copy, never more than the file's size in the manifest.

    Raises InvalidArtifact if the copy holds more bytes, is truncated, or is not a valid .xz file.
    """
    coder, left = lzma.LZMADecompressor(format=lzma.FORMAT_XZ), file.size
    try:
        for chunk in store.chunks(key + SUFFIX):
            data = chunk
            while not coder.eof:
                out = coder.decompress(data, CHUNK)
                data = b""
                left -= len(out)
                if left < 0:
                    raise InvalidArtifact("DigestMismatch", f"{file.name + SUFFIX} holds more than {file.size} bytes")
                if out:
                    yield out
                if coder.needs_input:
                    break
    except lzma.LZMAError as error:
        raise InvalidArtifact("DigestMismatch", f"{file.name + SUFFIX} is not a valid .xz file: {error}") from error
    if not coder.eof:
        raise InvalidArtifact("DigestMismatch", f"{file.name + SUFFIX} is truncated")


def _holds(store: S3Store, key: str, file: ManifestFile, stopped: Stopped) -> bool:
    """Return whether the compressed copy decompresses to the file in the manifest."""
    try:
        for _ in _Sum(file).following(decompressed(store, key, file)):
            if stopped():
                raise Interrupted
    except InvalidArtifact:
        return False
    return True


def _upload(store: S3Store, key: str, chunks: Iterator[bytes], stopped: Stopped) -> None:
    def watched() -> Iterator[bytes]:
        for chunk in chunks:
            if stopped():
                raise Interrupted
            yield chunk

    store.upload_stream(key, watched())
