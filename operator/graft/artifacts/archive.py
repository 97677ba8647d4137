"""Versions that nobody uses, compressed: each safetensors file becomes <name>.xz beside the manifest, which stays as it is.

A file is in storage as itself, as its compressed copy, or as both; never as neither, wherever the process is killed: a copy is read
back, decompressed and compared with the manifest's SHA-256 before the original may go, and the other way round. Everything is
streamed; memory is bounded by a part of an upload and by xz's window. All calls may be repeated, and take up what was left.

The format is plain .xz (`xz -d` reads it). Weights are nearly random bytes but for sign and exponent, so the coder is told that values have
two or four bytes (lp, pb): it then keeps statistics for each byte of a value, which is all that can be gained here.
"""

import hashlib
import lzma
from collections.abc import Callable, Iterator

from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.store import CHUNK, S3Store, StoreError
from graft.artifacts.versions import InvalidArtifact

SUFFIX = ".xz"
# Nothing repeats in weights, so the search for matches is as short as the coder allows: the same size in a fifth of the time.
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "lc": 2, "lp": 2, "pb": 2, "dict_size": 65536}
    | {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_HC3, "nice_len": 8, "depth": 1}
]
Stopped = Callable[[], bool]


class Interrupted(Exception):
    """The caller does not want the result any more."""


def weights(manifest: Manifest) -> list[ManifestFile]:
    """The files that are worth it."""
    return [file for file in manifest.files if file.name.endswith(".safetensors")]


def compress(store: S3Store, prefix: str, manifest: Manifest, stopped: Stopped) -> int:
    """Make, and verify, a compressed copy of each file that has none; the bytes of all copies. The originals stay."""
    there = {item.key: item.size for item in store.objects(prefix)}
    for file in weights(manifest):
        key = prefix + file.name
        if key + SUFFIX in there and _holds(store, key, file, stopped):
            continue
        if key not in there:
            raise InvalidArtifact("FileMissing", f"{file.name} is not in storage, nor is a sound compressed copy of it")
        expected = _Sum(file)
        _upload(store, key + SUFFIX, _compressed(expected.following(store.chunks(key))), stopped)
        if not expected.met:
            raise InvalidArtifact("DigestMismatch", f"{file.name} is not what the manifest says")
        if not _holds(store, key, file, stopped):
            raise StoreError("unavailable", f"{key + SUFFIX} was read back otherwise than it was written")
    copies = {prefix + file.name + SUFFIX for file in weights(manifest)}
    return sum(item.size for item in store.objects(prefix) if item.key in copies)


def drop_originals(store: S3Store, prefix: str, manifest: Manifest) -> None:
    """Delete what `compress` has just verified a copy of."""
    for file in weights(manifest):
        store.delete(prefix + file.name)


def restore(store: S3Store, prefix: str, manifest: Manifest, stopped: Stopped) -> None:
    """Make, and verify, each original anew, and then delete the copies. InvalidArtifact when a copy is not what it should be."""
    there = {item.key for item in store.objects(prefix)}
    for file in weights(manifest):
        key = prefix + file.name
        if key + SUFFIX not in there:
            continue  # it is restored already; whoever loads the version verifies it
        if key not in there or store.sha256(key) != (file.sha256, file.size):
            expected = _Sum(file)
            _upload(store, key, expected.following(_decompressed(store, key, file)), stopped)
            if store.sha256(key) != (file.sha256, file.size):
                raise StoreError("unavailable", f"{key} was read back otherwise than it was written")
        store.delete(key + SUFFIX)


def is_archived(store: S3Store, prefix: str, manifest: Manifest) -> bool:
    """Whether each file that is missing has a compressed copy, and one at least is missing."""
    there = {item.key.removeprefix(prefix) for item in store.objects(prefix)}
    missing = [file.name for file in manifest.files if file.name not in there]
    return bool(missing) and all(name + SUFFIX in there for name in missing)


def verify(store: S3Store, prefix: str, manifest: Manifest) -> None:
    """Compare every file with the manifest, a compressed one as it would be restored. InvalidArtifact says what differs."""
    there = {item.key for item in store.objects(prefix)}
    for file in manifest.files:
        key = prefix + file.name
        if key not in there and key + SUFFIX not in there:
            raise InvalidArtifact("FileMissing", f"{file.name} is not in storage")
        chunks = store.chunks(key) if key in there else _decompressed(store, key, file)
        for _ in _Sum(file).following(chunks):
            pass


def leftovers(store: S3Store, prefix: str, manifest: Manifest) -> bool:
    """Whether an original is there beside its copy: somebody was killed between the two."""
    there = {item.key.removeprefix(prefix) for item in store.objects(prefix)}
    return any(file.name in there and file.name + SUFFIX in there for file in weights(manifest))


class _Sum:
    """The SHA-256 and size of what passes by, to be compared with the manifest's."""

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


def _decompressed(store: S3Store, key: str, file: ManifestFile) -> Iterator[bytes]:
    """The bytes of a compressed copy; never more of them than the manifest says, whatever the copy claims."""
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
        raise InvalidArtifact("DigestMismatch", f"{file.name + SUFFIX} is no sound .xz file: {error}") from error
    if not coder.eof:
        raise InvalidArtifact("DigestMismatch", f"{file.name + SUFFIX} is cut short")


def _holds(store: S3Store, key: str, file: ManifestFile, stopped: Stopped) -> bool:
    """Whether the compressed copy is the file."""
    try:
        for _ in _Sum(file).following(_decompressed(store, key, file)):
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
