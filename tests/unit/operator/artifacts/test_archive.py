"""Compression of archived versions, against a real S3 server.

A restored file equals its original. At every moment the store holds the original or a valid compressed copy.
"""

import hashlib
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts import archive
from graft.artifacts import store as store_module
from graft.artifacts.layout import SIGNATURE
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.signing import Statement, document, generate, read_keys, sign
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, describe_files, verify
from graft.cli.failure import CliFailure
from graft.cli.verification import check
from worlds.buckets import empty_bucket, publish

PREFIX = "shop/adapters/support/1.0.0/"
WEIGHTS = PREFIX + "adapter_model.safetensors"
COPY = WEIGHTS + archive.SUFFIX


@pytest.fixture(scope="module")
def store() -> Iterator[S3Store]:
    with empty_bucket() as store:
        yield store


def weights(values: int) -> bytes:
    """Return bytes that compress like float32 weights: few signs and exponents, and random mantissas."""
    source = random.Random(7)
    return b"".join(source.randbytes(3) + bytes([source.choice([60, 61, 188, 189])]) for _ in range(values))


@pytest.fixture
def version(store: S3Store, tmp_path: Path) -> tuple[Manifest, str]:
    """Publish a version. Return its manifest and the digest of the manifest."""
    if list(store.objects("shop/")):
        store.delete_prefix("shop/adapters/")
        store.delete_prefix("shop/runs/")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(weights(50_000))
    files = {path.name: path for path in tmp_path.iterdir()}
    manifest = Manifest(
        adapter="support", version="1.0.0", method="lora", base_model=ManifestBaseModel(name="tiny", uri="s3://b/m"),
        job=ManifestJob(name="j", namespace="shop", uid="u", attempt="a"), recipe="r", hyperparameters={},
        files=describe_files(files), created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    return manifest, publish(store, PREFIX, files, manifest)


def never() -> bool:
    return False


def keys(store: S3Store) -> set[str]:
    return {item.key.removeprefix(PREFIX) for item in store.objects(PREFIX)}


def test_verify_accepts_compressed_weights_and_reports_wrong_ones(
    store: S3Store, version: tuple[Manifest, str]
) -> None:
    manifest, digest = version
    key = read_keys({"a.key": generate()})
    statement = Statement("shop", "support", "1.0.0", f"s3://{store.config.bucket}/{PREFIX}", digest)
    store.put(PREFIX + SIGNATURE, document(statement, sign(key, statement)))
    assert check(store, "shop", "support", "1.0.0", key.public).text.endswith("every SHA-256 verified")
    archive.compress(store, PREFIX, manifest, never)
    archive.drop_originals(store, PREFIX, manifest)
    assert check(store, "shop", "support", "1.0.0", key.public).text.endswith("verified; the weights are compressed")
    store.put(COPY, lzma.compress(b"other weights"))
    with pytest.raises(CliFailure, match=r"NOT what was verified: adapter_model\.safetensors has 13 bytes"):
        check(store, "shop", "support", "1.0.0", key.public)
    store.delete(COPY)
    with pytest.raises(CliFailure, match=r"adapter_model\.safetensors is not in storage"):
        check(store, "shop", "support", "1.0.0", key.public)


def test_compress_and_restore_keep_the_digests(store: S3Store, version: tuple[Manifest, str]) -> None:
    manifest, digest = version
    size = manifest.files[1].size
    stored = archive.compress(store, PREFIX, manifest, never)
    assert 0 < stored < 0.9 * size
    assert keys(store) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.safetensors.xz",
        "manifest.json",
    }
    assert archive.leftovers(store, PREFIX, manifest) and not archive.is_archived(store, PREFIX, manifest)
    verify(store, PREFIX, digest)

    archive.drop_originals(store, PREFIX, manifest)
    assert keys(store) == {"adapter_config.json", "adapter_model.safetensors.xz", "manifest.json"}
    assert archive.is_archived(store, PREFIX, manifest) and not archive.leftovers(store, PREFIX, manifest)
    # Every xz tool can decompress the copy. Graft is not needed.
    plain = lzma.decompress(store.get(COPY))
    assert hashlib.sha256(plain).hexdigest() == manifest.files[1].sha256

    archive.restore(store, PREFIX, manifest, never)
    assert keys(store) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    verify(store, PREFIX, digest)


def test_compress_refuses_an_original_that_does_not_match_the_manifest(
    store: S3Store, version: tuple[Manifest, str]
) -> None:
    manifest, _ = version
    store.put(WEIGHTS, b"something else")
    with pytest.raises(InvalidArtifact) as found:
        archive.compress(store, PREFIX, manifest, never)
    assert found.value.reason == "DigestMismatch"
    assert COPY not in [item.key for item in store.objects(PREFIX)]
    assert store.get(WEIGHTS) == b"something else"


def test_compress_replaces_a_damaged_copy_while_the_original_exists(
    store: S3Store, version: tuple[Manifest, str]
) -> None:
    manifest, digest = version
    archive.compress(store, PREFIX, manifest, never)
    good = store.get(COPY)
    for damaged in (good[:-20], good[:1000] + b"x" + good[1001:], lzma.compress(b"another file"), b""):
        store.put(COPY, damaged)
        archive.compress(store, PREFIX, manifest, never)
        assert store.get(COPY) == good
    verify(store, PREFIX, digest)


@pytest.mark.parametrize("damage", ["cut", "flipped", "another", "bomb", "empty"])
def test_restore_reports_a_damaged_copy_and_keeps_it(
    store: S3Store, version: tuple[Manifest, str], damage: str
) -> None:
    manifest, _ = version
    archive.compress(store, PREFIX, manifest, never)
    archive.drop_originals(store, PREFIX, manifest)
    good = store.get(COPY)
    data = {
        "cut": good[:-20],
        "flipped": good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
        "another": lzma.compress(b"another file"),
        "bomb": lzma.compress(bytes(50_000_000)),
        "empty": b"",
    }[damage]
    store.put(COPY, data)
    with pytest.raises(InvalidArtifact) as found:
        archive.restore(store, PREFIX, manifest, never)
    assert found.value.reason == "DigestMismatch"
    assert store.get(COPY) == data and WEIGHTS not in [item.key for item in store.objects(PREFIX)]


class Killed(Exception):
    """Stands for the end of the process."""


def killed_at(store: S3Store, call: int) -> Callable[..., Any]:
    """Return a replacement for `S3Store._call`. After `call` calls, every further call raises Killed."""
    count, real = 0, S3Store._call.__get__(store)

    def once(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count > call:
            raise Killed
        return real(*arguments, **named)

    return once


def sound(store: S3Store, manifest: Manifest) -> bool:
    """Return whether the store holds the weights, as the file or as a valid compressed copy."""
    (file,) = archive.weights(manifest)
    there = {item.key for item in store.objects(PREFIX)}
    if WEIGHTS in there and store.sha256(WEIGHTS) == (file.sha256, file.size):
        return True
    return COPY in there and hashlib.sha256(lzma.decompress(store.get(COPY))).hexdigest() == file.sha256


def test_a_kill_before_any_store_call_loses_no_weights(
    store: S3Store, version: tuple[Manifest, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, digest = version

    def put_away() -> None:
        archive.compress(store, PREFIX, manifest, never)
        archive.drop_originals(store, PREFIX, manifest)

    for work in (put_away, lambda: archive.restore(store, PREFIX, manifest, never)):
        for call in range(60):
            with monkeypatch.context() as patch:
                patch.setattr(store, "_call", killed_at(store, call), raising=False)
                try:
                    work()
                except Killed:
                    done = False
                else:
                    done = True
            assert sound(store, manifest), f"the weights are lost if the process dies after {call} calls of the store"
            if done:
                break
        assert done
    verify(store, PREFIX, digest)


def test_an_interrupted_compression_keeps_the_original(store: S3Store, version: tuple[Manifest, str]) -> None:
    manifest, digest = version
    with pytest.raises(archive.Interrupted):
        archive.compress(store, PREFIX, manifest, lambda: True)
    assert COPY not in [item.key for item in store.objects(PREFIX)]
    verify(store, PREFIX, digest)


def test_compress_aborts_an_unfinished_multipart_upload(store: S3Store, version: tuple[Manifest, str]) -> None:
    manifest, _ = version
    store._call("create_multipart_upload", COPY)
    archive.compress(store, PREFIX, manifest, never)
    assert store.client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []


def test_upload_stream_handles_many_parts_no_parts_and_a_broken_source(store: S3Store) -> None:
    source = random.Random(1)
    data = source.randbytes(store_module.PART + 100)
    store.upload_stream("shop/runs/x/big", (data[at : at + 1_000_000] for at in range(0, len(data), 1_000_000)))
    assert store.sha256("shop/runs/x/big") == (hashlib.sha256(data).hexdigest(), len(data))
    store.upload_stream("shop/runs/x/empty", iter(()))
    assert store.get("shop/runs/x/empty") == b""

    def broken() -> Iterator[bytes]:
        yield data
        raise OSError("the source ended")

    with pytest.raises(OSError):
        store.upload_stream("shop/runs/x/broken", broken())
    with pytest.raises(StoreError):
        store.head("shop/runs/x/broken")
    assert store.client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
