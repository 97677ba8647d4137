"""The agent against a real S3 server that is slow, cut off, corrupt or overloaded, or that denies the key.

During the fault the pod keeps serving its loaded adapters. Afterwards it loads every wanted adapter.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.contracts.agent import WantedAdapter
from graft_server.agent.storage.objects import Storage
from testbed.faults import EXPIRED_TOKEN, SLOW_DOWN, Fault, FaultyProxy, faulty_proxy
from testbed.objectstore import S3Server
from worlds.agent import Pod, serving
from worlds.buckets import issue
from worlds.serving import MemoryStore, eventually

BUCKET = "bucket"
MIB = 1 << 20
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> S3Store:
    """Create the bucket. Return it, opened with the root key."""
    config = StorageConfig(s3.endpoint, "us-east-1", BUCKET, "", s3.access_key, s3.secret_key)
    store = S3Store(config)
    store.create_bucket()
    return store


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3.endpoint) as proxy:
        yield proxy


def write_secret(folder: Path, **values: str) -> None:
    """Write entries of the mounted Secret. Each file is replaced atomically, as the kubelet does it."""
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / f".{name}").write_text(value)
        (folder / f".{name}").rename(folder / name.replace("_", "-"))


class Rig:
    """A pod whose store is the real S3 server behind the proxy."""

    def __init__(self, pod: Pod, start: Callable[[], Awaitable[None]], store: S3Store, secret: Path) -> None:
        self.pod = pod
        self.restart = start
        self.store = store
        self.secret = secret

    def publish(self, name: str, size: int = 1280) -> WantedAdapter:
        """Put a version into the real store. Return it as a wanted adapter."""
        memory = MemoryStore()
        wanted = memory.publish(name, size=size)
        for key, data in memory.objects.items():
            self.store.put(key, data)
        return wanted

    async def told(self, adapter: WantedAdapter, reason: str) -> None:
        await eventually(lambda: (one := self.pod.one(adapter)) and one.reason == reason, seconds=20)

    async def unharmed(self, others: list[WantedAdapter]) -> None:
        """Check that the pod is ready and that these adapters are still loaded."""
        assert await self.pod.agent.not_ready() is None
        for adapter in others:
            assert (one := self.pod.one(adapter)) is not None and one.state == "Loaded"


@asynccontextmanager
async def rig(
    tmp_path: Path, store: S3Store, proxy: FaultyProxy, stall_seconds: float = 1.0
) -> AsyncIterator[tuple[Rig, WantedAdapter]]:
    """Yield a ready pod with one loaded adapter, and that adapter."""
    config = store.config
    secret = tmp_path / "secret"
    write_secret(
        secret,
        endpoint=proxy.endpoint,
        bucket=BUCKET,
        access_key_id=config.access_key_id,
        secret_access_key=config.secret_access_key,
    )
    async with serving(tmp_path, storage=Storage(secret, stall_seconds=stall_seconds)) as (pod, session, url):
        made = Rig(pod, partial(pod.start, session, url), store, secret)
        first = made.publish("first")
        pod.want(first)
        await pod.ready()
        yield made, first


BAD = "bad/1.0.0/"
FAULTS = {
    "cut": (Fault(match=BAD + WEIGHTS, cut_at=64 * 1024), "StorageUnavailable"),
    "cut-manifest": (Fault(match=BAD + "manifest", cut_at=100), "StorageUnavailable"),
    "hang": (Fault(match=BAD + "manifest", hang_at=0), "StorageUnavailable"),
    "hang-midway": (Fault(match=BAD + WEIGHTS, hang_at=200_000), "StorageUnavailable"),
    "flipped-bit": (Fault(match=BAD + WEIGHTS, flip_at=100_000), "DigestMismatch"),
    "flipped-manifest": (Fault(match=BAD + "manifest", flip_at=100), "DigestMismatch"),
    "broken": (Fault(match=BAD, status=500, code="InternalError"), "StorageUnavailable"),
    "denied": (Fault(match=BAD, status=403, code="AccessDenied"), "StorageDenied"),
    "expired": (EXPIRED_TOKEN, "CredentialsInvalid"),
    "throttled": (SLOW_DOWN, "StorageThrottled"),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_a_store_fault_affects_only_its_own_adapter_and_the_download_is_retried(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy, kind: str
) -> None:
    fault, reason = FAULTS[kind]
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad, good = made.publish("bad", size=2 * MIB), made.publish("good")
        proxy.inject(fault)
        made.pod.want(first, bad, good)
        await made.told(bad, reason)
        if fault.match:
            await made.pod.state(good, "Loaded")
        await made.unharmed([first, good] if fault.match else [first])
        assert bad.engine_name not in made.pod.engine.adapters
        proxy.lift()
        for adapter in (bad, good):
            await eventually(lambda adapter=adapter: made.pod.one(adapter).state == "Loaded", seconds=30)  # type: ignore[union-attr]
        await made.unharmed([first, bad, good])
        assert sorted(made.pod.engine.calls) == sorted(f"load {one.engine_name}" for one in (first, bad, good))
        assert sorted(path.name for path in made.pod.dir.iterdir()) == sorted(made.pod.engine.adapters)
        loaded = (made.pod.dir / bad.engine_name / WEIGHTS).read_bytes()
        assert loaded == bucket.get(bad.uri.removeprefix(f"s3://{BUCKET}/") + WEIGHTS)


async def test_a_bit_that_flips_once_is_downloaded_again_and_not_reported(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy
) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad = made.publish("bad", size=2 * MIB)
        proxy.inject(
            Fault(match=BAD + WEIGHTS, flip_at=100_000, times=1), Fault(match=BAD + "manifest", flip_at=9, times=1)
        )
        made.pod.want(first, bad)
        await made.pod.state(bad, "Loaded")
        assert not [one for said in made.pod.told for one in said.adapters if one.reason]
        assert len(proxy.reads(BAD + WEIGHTS)) == 2 and len(proxy.reads(BAD + "manifest")) == 2


async def test_a_cut_download_resumes_where_it_stopped(tmp_path: Path, bucket: S3Store, proxy: FaultyProxy) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad = made.publish("bad", size=4 * MIB)
        proxy.inject(Fault(match=BAD + WEIGHTS, cut_at=3 * MIB, times=1))
        made.pod.want(first, bad)
        await made.pod.state(bad, "Loaded")
        one, other = proxy.reads(BAD + WEIGHTS)
        assert one.range is None and other.range is not None
        assert 2 * MIB < int(other.range.removeprefix("bytes=").removesuffix("-")) <= 3 * MIB


async def test_a_slow_download_delays_no_other_adapter(tmp_path: Path, bucket: S3Store, proxy: FaultyProxy) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad, good = made.publish("bad", size=2 * MIB), made.publish("good")
        proxy.inject(Fault(match=BAD, latency=0.3, bytes_per_second=MIB))
        made.pod.want(first, bad, good)
        await made.pod.state(good, "Loaded")
        assert made.pod.one(bad).state == "Loading"  # type: ignore[union-attr]
        await made.unharmed([first, good])
        done = await made.pod.state(bad, "Loaded")
        assert done.load_seconds is not None and done.load_seconds > 2


async def test_the_download_of_an_adapter_that_is_no_longer_wanted_is_cancelled(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy
) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad = made.publish("bad", size=8 * MIB)
        proxy.inject(Fault(match=BAD + WEIGHTS, bytes_per_second=MIB))
        made.pod.want(first, bad)
        await eventually(lambda: list(made.pod.dir.glob(".partial-*")))
        made.pod.want(first)
        await eventually(lambda: [path.name for path in made.pod.dir.iterdir()] == [first.engine_name], seconds=3)


async def test_the_agent_waits_as_long_as_an_overloaded_store_asks(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy
) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        bad = made.publish("bad")
        proxy.inject(replace(SLOW_DOWN, retry_after=3))
        made.pod.want(first, bad)
        await made.told(bad, "StorageThrottled")
        asked = time.monotonic()
        proxy.lift()
        await made.pod.state(bad, "Loaded")
        assert time.monotonic() - asked > 2.5
        assert len(proxy.reads(BAD + "manifest")) == 2


async def test_many_hanging_downloads_delay_no_new_adapter(tmp_path: Path, bucket: S3Store, proxy: FaultyProxy) -> None:
    async with rig(tmp_path, bucket, proxy, stall_seconds=4.0) as (made, first):
        bad = [made.publish(f"hanging{number}") for number in range(12)]
        proxy.inject(Fault(match="hanging", hang_at=0))
        made.pod.want(first, *bad)
        for adapter in bad:
            await made.told(adapter, "StorageUnavailable")
        good = made.publish("good")
        made.pod.want(first, *bad, good)  # the agent retries all of them
        started = time.monotonic()
        await made.pod.state(good, "Loaded")
        assert time.monotonic() - started < 3


async def test_renewed_credentials_need_no_restart(
    tmp_path: Path, s3: S3Server, bucket: S3Store, proxy: FaultyProxy
) -> None:
    identity = VersityIdentity(bucket, s3.endpoint)
    key = issue(identity, "team-a")
    async with rig(tmp_path, bucket, proxy) as (made, first):
        write_secret(
            made.secret, access_key_id=key.access_key_id, secret_access_key=key.secret_access_key, prefix=key.prefix
        )
        second, third = made.publish("second"), made.publish("third")
        made.pod.want(first, second)
        await made.pod.state(second, "Loaded")  # downloaded with the new key

        renewed = issue(identity, "team-a")  # the old key stops working
        made.pod.want(first, second, third)
        await made.told(third, "CredentialsInvalid")
        assert "key of the storage Secret" in str(made.pod.one(third).message)  # type: ignore[union-attr]
        await made.unharmed([first, second])
        for _ in range(4):  # each failed retry makes the back-off longer
            made.pod.want(first, second, third)
        write_secret(made.secret, secret_access_key=renewed.secret_access_key)
        await made.pod.state(third, "Loaded")
        await made.unharmed([first, second, third])


async def test_a_pod_that_starts_with_an_expired_key_is_not_ready(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy
) -> None:
    async with rig(tmp_path, bucket, proxy) as (made, first):
        proxy.inject(EXPIRED_TOKEN)
        await made.pod.kill()
        shutil.rmtree(made.pod.dir)
        made.pod.engine.restart()
        await made.restart()
        made.pod.want(first)
        await made.told(first, "CredentialsInvalid")
        assert "waiting for adapters" in str(await made.pod.agent.not_ready())
        proxy.lift()
        await made.pod.ready()
