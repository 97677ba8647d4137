"""Downloads of large objects over broken connections, from unavailable stores and to full disks.

The store is a real S3 server behind a proxy that injects faults.
"""

import dataclasses
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import pytest
from graft.artifacts import sources, storage
from graft.artifacts.sources import SourceError, describe, fetch, hub_errors
from graft.artifacts.storage import StorageConfig, StoreError, patiently
from graft.artifacts.store import RANGE, ObjectInfo, S3Store
from graft_server.agent.storage.fetchbase import fetch_base
from testbed.faults import Fault, FaultyProxy, faulty_proxy
from testbed.objectstore import S3Server, s3_server

KEY = "models/large/model.safetensors"
URI = "s3://bucket/models/large"
LARGE = os.urandom(5 * RANGE + 12345)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def config(server: S3Server) -> StorageConfig:
    config = StorageConfig.from_dir(server.secret_dir("bucket"))
    filled = S3Store(config)
    filled.create_bucket()
    filled.put(KEY, LARGE)
    filled.put("models/large/config.json", b"{}")
    return config


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(server.endpoint) as proxy:
        yield proxy


def through(proxy: FaultyProxy, config: StorageConfig, patience: float = 0) -> S3Store:
    """Return the store behind the proxy. botocore's own retries are off."""
    return S3Store(dataclasses.replace(config, endpoint=proxy.endpoint), attempts=1, timeout=1, patience=patience)


def fetched(store: S3Store, target: Path, **how: object) -> Path:
    return fetch(URI, describe(URI, store, None).digest, target, store=store, pvc_root=target, **how)  # type: ignore[arg-type]


def bytes_sent(proxy: FaultyProxy) -> int:
    """Return how many bytes of the weights the range requests asked for."""
    asked = [seen.range.removeprefix("bytes=").split("-") for seen in proxy.reads(KEY) if seen.range]
    return sum(int(last) - int(first) + 1 for first, last in asked)


def test_progress_grows_within_a_file(config: StorageConfig, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = fetched(S3Store(config), tmp_path / "base", report=lambda done, total: told.append((done, total)))
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    total = len(LARGE) + 2
    assert len(told) > 50 and told == sorted(told) and told[-1] == (total, total)


@pytest.mark.parametrize("fault", [Fault(KEY, times=3, cut_at=3_000_000), Fault(KEY, times=2, hang_at=3_000_000)])
def test_a_broken_download_resumes(fault: Fault, config: StorageConfig, proxy: FaultyProxy, tmp_path: Path) -> None:
    told: list[int] = []
    proxy.inject(fault)
    folder = fetched(through(proxy, config, 20), tmp_path / "base", report=lambda done, _: told.append(done))
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert told[-1] == max(told) == len(LARGE) + 2
    assert bytes_sent(proxy) <= len(LARGE) + 3 * RANGE, "only the broken ranges are requested again"


def test_a_download_resumes_if_the_store_returns_within_the_patience(
    config: StorageConfig, server: S3Server, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store, first = through(proxy, config, 20), threading.Event()
    item = store.head(KEY)

    def away() -> None:
        first.wait()
        server.stop()
        time.sleep(2)
        server.start()

    outage = threading.Thread(target=away)
    outage.start()
    proxy.inject(Fault(KEY, bytes_per_second=10e6))  # slow enough that the outage interrupts the download
    store.download(item, tmp_path / "file", report=lambda *_: first.set())
    outage.join()
    assert (tmp_path / "file").read_bytes() == LARGE


def test_a_store_that_is_unavailable_for_longer_than_the_patience_fails_the_download(
    config: StorageConfig, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store = through(proxy, config, 4)
    proxy.inject(Fault(KEY, cut_at=1_000_000))
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        fetched(store, tmp_path / "base")
    assert caught.value.transient and 2 < time.monotonic() - began < 10
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"], "no partial file is left"
    proxy.inject(Fault("list-type", status=503, code="SlowDown"))
    with pytest.raises(SourceError) as caught:
        fetch(URI, None, tmp_path / "base", store=through(proxy, config), pvc_root=tmp_path)
    assert caught.value.transient


def test_a_listing_that_fails_for_a_while_is_retried(config: StorageConfig, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.inject(Fault("list-type", times=2, status=503, code="SlowDown"))
    fetch(URI, None, tmp_path / "base", store=through(proxy, config, 10), pvc_root=tmp_path)
    assert (tmp_path / "base/model.safetensors").read_bytes() == LARGE


def test_an_interrupt_does_not_wait_for_running_downloads(
    config: StorageConfig, proxy: FaultyProxy, tmp_path: Path
) -> None:
    class Asked(BaseException):
        pass

    def ask(*_: object) -> None:
        raise Asked

    store, before = through(proxy, config), signal.signal(signal.SIGUSR1, ask)
    item = store.head(KEY)
    proxy.inject(Fault(KEY, bytes_per_second=1e6))
    asking = threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    asking.start()
    began = time.monotonic()
    try:
        with pytest.raises(Asked):
            store.download(item, tmp_path / "file")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < 4 and not list(tmp_path.iterdir())


def test_an_object_that_is_replaced_during_the_download_is_refused(
    config: StorageConfig, proxy: FaultyProxy, tmp_path: Path
) -> None:
    other = bytes(len(LARGE))

    def replace() -> None:
        if len(proxy.reads(KEY)) == 4:
            S3Store(config).put(KEY, other)

    proxy.on_request = replace
    with pytest.raises(SourceError, match="replaced by another object") as caught:
        fetched(through(proxy, config, 20), tmp_path / "base")
    assert not caught.value.transient
    assert not (tmp_path / "base/model.safetensors").exists()


def test_a_small_object_is_verified_with_its_stored_checksum(
    config: StorageConfig, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store, data = through(proxy, config, 5), os.urandom(100_000)
    store.put("small", data)
    item = store.head("small")
    proxy.inject(Fault("small", times=1, flip_at=5000))
    store.download(item, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == data
    assert [seen.range for seen in proxy.reads("small") if seen.method == "GET"] == [None, None]
    proxy.inject(Fault("small", flip_at=5000))
    with pytest.raises(StoreError, match="checksum"):
        through(proxy, config).download(item, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_empty_object_is_downloaded(config: StorageConfig, tmp_path: Path) -> None:
    store = S3Store(config)
    store.put("empty", b"")
    store.download(store.head("empty"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_missing_or_forbidden_object_fails_without_retries(config: StorageConfig, tmp_path: Path) -> None:
    gone = ObjectInfo("models/none", 5, "etag")
    wrong = dataclasses.replace(config, secret_access_key="not-it")
    nowhere = dataclasses.replace(config, bucket="another")
    for opened, trouble in ((config, "missing"), (wrong, "denied"), (nowhere, "bucket")):
        with pytest.raises(StoreError) as caught:
            S3Store(opened, patience=60).download(gone, tmp_path / "file")
        assert caught.value.trouble == trouble


def test_a_full_disk_is_reported_as_a_full_disk(config: StorageConfig, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        fetched(S3Store(config, patience=60), tmp_path)
    assert caught.value.errno == ENOSPC


def test_a_model_that_does_not_fit_on_the_disk_is_not_downloaded(
    config: StorageConfig, server: S3Server, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        OSError, match=r"0\.08 GB of s3://bucket/models/large must be downloaded, but only 0\.00 GB are free"
    ):
        fetched(through(proxy, config), tmp_path / "base")
    assert not proxy.reads(KEY)
    log = tmp_path / "termination-log"
    secret = str(server.secret_dir("bucket"))
    target = ["--target", str(tmp_path / "base"), "--termination-log", str(log), "--storage-dir", secret]
    assert fetch_base(["--uri", URI, *target]) == 14
    said = log.read_text()
    assert "the disk is full" in said and "ephemeral-storage" in said


def test_a_full_disk_is_not_reported_as_an_unavailable_hub() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, hub_errors("hf://org/model"):
        full.write_bytes(b"weights")
    assert not isinstance(caught.value, SourceError) and caught.value.errno == ENOSPC


def test_a_call_that_took_longer_than_the_patience_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock.now)
    tries: list[float] = []

    def pause(seconds: float) -> None:
        clock.now += seconds

    def breaks(times: int) -> str:
        tries.append(clock.now)
        clock.now += 600 if len(tries) == 1 else 0
        if len(tries) <= times:
            raise StoreError("unavailable", f"reset {len(tries)}")
        return hashlib.sha256(b"").hexdigest()

    assert patiently(lambda: breaks(3), 180, pause)
    assert tries == [0, 601, 603, 607]
    tries.clear()
    with pytest.raises(StoreError):
        patiently(lambda: breaks(100), 180, pause)
    assert 165 < tries[-1] - tries[1] <= 180
