"""Error answers of a store: the message has the request, the code and the store's own words, and none of the library's."""

from dataclasses import replace
from pathlib import Path

import pytest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from worlds.buckets import empty_bucket


def test_a_refusal_is_told_in_the_words_of_the_store(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"a")
    with empty_bucket() as store:
        stranger = S3Store(replace(store.config, secret_access_key="wrong"), attempts=1)
        elsewhere = S3Store(replace(store.config, bucket="other-bucket"), attempts=1)
        cases = [
            ("missing", "s3://bucket/nothing: the store answered GetObject with NoSuchKey", lambda: store.get("nothing")),
            ("missing", "s3://bucket/nothing: the store answered HeadObject with 404", lambda: store.head("nothing")),
            ("denied", "the store answered PutObject with SignatureDoesNotMatch", lambda: stranger.put("a", b"a")),
            ("denied", "a: the store answered PutObject with SignatureDoesNotMatch", lambda: stranger.upload("a", source)),
            ("denied", "listing s3://bucket/a: the store answered ListObjectsV2", lambda: list(stranger.objects("a"))),
            ("bucket", "the store answered GetObject with NoSuchBucket", lambda: elsewhere.get("a")),
        ]  # fmt: skip
        for trouble, words, call in cases:
            with pytest.raises(StoreError) as caught:
                call()
            said = str(caught.value).replace(store.config.bucket, "bucket")
            assert caught.value.trouble == trouble and words in said
            assert "An error occurred" not in said
