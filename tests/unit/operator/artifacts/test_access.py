"""The key of a namespace is replaced while its pods run."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft_trainer.run.upload import upload_apart
from testbed.shell import wait_for
from worlds.buckets import empty_bucket, issue, mount


@pytest.fixture(scope="module")
def identity() -> Iterator[VersityIdentity]:
    with empty_bucket() as store:
        yield VersityIdentity(store, store.config.endpoint, "cluster/graft-system")


@pytest.fixture
def pod(identity: VersityIdentity, tmp_path: Path) -> S3Store:
    """Open the store as a training pod of the tenant shop does."""
    mount(issue(identity, "shop"), tmp_path)
    return S3Store(StorageConfig.from_dir(tmp_path), attempts=1, patience=30, folder=tmp_path)


def test_a_pod_that_runs_waits_for_its_new_key(
    identity: VersityIdentity, pod: S3Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pod.put("shop/before", b"1")
    key = issue(identity, "shop")
    writing = threading.Thread(target=pod.put, args=("shop/after", b"2"))
    writing.start()
    wait_for(lambda: "refuses the key" in caplog.text, 10, "the store has refused the old key")
    mount(key, tmp_path)
    writing.join(20)
    assert pod.get("shop/after") == b"2" and pod.config == StorageConfig.from_dir(tmp_path)


def test_an_upload_in_its_own_process_and_a_call_that_is_not_retried_use_the_new_key(
    identity: VersityIdentity, pod: S3Store, tmp_path: Path
) -> None:
    progress = S3Store(pod.config, attempts=1, folder=tmp_path)
    file = tmp_path / "part"
    file.write_bytes(os.urandom(1000))
    mount(issue(identity, "shop"), tmp_path)
    upload_apart(pod, "shop/runs/part", file)
    with pytest.raises(StoreError, match=r"InvalidAccessKeyId|SignatureDoesNotMatch"):
        progress.put("shop/runs/progress.json", b"{}")
    progress.put("shop/runs/progress.json", b"{}")
    assert pod.get("shop/runs/part") == file.read_bytes()


def test_a_key_that_is_wrong_from_the_beginning_fails_at_once(
    identity: VersityIdentity, pod: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    issue(identity, "shop")
    with pytest.raises(StoreError) as error:
        pod.put("shop/never", b"")
    assert error.value.trouble == "denied" and "retrying" not in caplog.text


def test_a_right_that_is_missing_fails_at_once(pod: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    pod.put("shop/before", b"1")
    with pytest.raises(StoreError) as error:
        pod.put("models/tiny/config.json", b"{}")
    assert error.value.trouble == "denied" and "retrying" not in caplog.text
