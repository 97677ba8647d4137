"""The description of a base model at its source, from a real S3 server."""

from collections.abc import Iterator

import pytest
from graft.artifacts.layout import SIGNATURE
from graft.artifacts.sources import describe
from graft.artifacts.store import S3Store
from worlds.buckets import empty_bucket

PREFIX = "shop/adapters/whole/1.0.0/"


@pytest.fixture(scope="module")
def store() -> Iterator[S3Store]:
    with empty_bucket() as store:
        yield store


def test_a_new_signature_does_not_change_the_digest_of_a_base_model(store: S3Store) -> None:
    """The source of a BaseModel may be a whole model that Graft composed or imported.

    A key rotation also renews the signature of that version.
    """
    uri = f"s3://{store.config.bucket}/{PREFIX}"

    def digest() -> str | None:
        return describe(uri, store, None).digest

    store.put(PREFIX + "config.json", b"{}")
    store.put(PREFIX + "model.safetensors", b"weights")
    published = digest()
    for signature in (b"by the old key", b"by the new key"):
        store.put(PREFIX + SIGNATURE, signature)
        assert digest() == published
    store.put(PREFIX + "model.safetensors", b"others")
    assert digest() != published
