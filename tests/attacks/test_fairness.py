"""A tenant who tries to keep the operator so busy that it does nothing for the others."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from graft.api import AdapterDeployment
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo
from graft.placement import replicaroom
from graft.placement.replicaroom import enough, remedies
from graft.placement.replicas import Capacity, Item, ReplicaPod, Work, plan
from graft.reconcile.adapter.adapter import reconcile
from graft.reconcile.adapterdeployment.adapterdeployment import _computed
from graft.reconcile.adapterdeployment.deploymentstatus import World
from graft.reconcile.shared import backoff, queue
from graft.reconcile.shared.backoff import Backoff
from graft.reconcile.shared.queue import Queue
from graft.reconcile.shared.transfers import Transfers
from graft.work.turns import Turns
from worlds.reconciling import MemoryKube, MemoryStore, Object, adapter, context, publish, ready

WEIGHTS = "adapter_model.safetensors"


def version(store: MemoryStore, namespace: str, name: str) -> Object:
    """A published version with its Adapter."""
    prefix = f"{namespace}/adapters/{name}/1.0.0/"
    return adapter(f"s3://graft/{prefix}", publish(store, prefix, name), namespace, name)


async def until(there: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    """A store whose gate is opened at the end, so that no thread is left."""
    made = MemoryStore()
    yield made
    made.gate.set()


async def test_large_artifacts_hold_neither_places_of_the_queue_nor_the_probe(store: MemoryStore) -> None:
    """A tenant creates 40 Adapters with files that take for ever to read -> no reconcile waits, others are verified."""
    many = [version(store, "greedy", f"a{number}") for number in range(40)]
    honest = version(store, "shop", "support")
    store.gate.clear()
    ctx = context(MemoryKube(*many, honest), store)
    started = Queue({"Adapter": lambda namespace, name: reconcile(ctx, namespace, name)})
    ctx.wake = started.wake
    try:
        for raw in many:
            started.wake("Adapter", "greedy", raw["metadata"]["name"])
        await until(lambda: len(store.reading) == 2)
        await until(lambda: not started.busy)  # what the probe looks at
        started.wake("Adapter", "shop", "support-1.0.0")
        await until(lambda: any(key.startswith("shop/") for key in store.reading))
        assert sum(key.startswith("greedy/") for key in store.reading) == 2  # the tenant's share
        store.gate.set()
        await until(lambda: ready(honest).get("reason") == "Verified")
        await until(lambda: all(ready(raw).get("reason") == "Verified" for raw in many))
    finally:
        await started.stop()
    assert set(store.read.values()) <= {len(data) for data in store.objects_.values()}  # each byte was read once


async def settle(ctx: Any, namespace: str = "shop", name: str = "support") -> float | None:
    """Reconcile until no verification runs. Return the seconds until the next reconcile."""
    while True:
        pause = await reconcile(ctx, namespace, f"{name}-1.0.0")
        if ctx.transfers.find(f"uid-{namespace}-{name}") is None:
            return pause
        await asyncio.sleep(0.01)


async def test_missing_files_cost_no_reads_and_ever_longer_pauses(store: MemoryStore) -> None:
    """A tenant publishes manifests of files that are missing -> nothing is read, and the pauses double to 5 minutes."""
    raw = version(store, "shop", "support")
    kept = store.objects_.pop(f"shop/adapters/support/1.0.0/{WEIGHTS}")
    now = 0.0
    ctx = context(MemoryKube(raw), store)
    ctx.backoff = Backoff(lambda: now)
    pauses = []
    for _ in range(8):
        pause = await settle(ctx)
        assert pause is not None and ready(raw)["reason"] == "FileMissing" and WEIGHTS in ready(raw)["message"]
        pauses.append(pause)
        before = len(store.requests)
        for _ in range(5):  # events of siblings, of deployments, of the status itself
            assert 0 < (await reconcile(ctx, "shop", "support-1.0.0") or 0) <= max(pause, 5)
        assert len(store.requests) == before
        now += pause
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
    assert store.read == {}
    store.objects_[f"shop/adapters/support/1.0.0/{WEIGHTS}"] = kept
    assert await settle(ctx) is None and ready(raw)["reason"] == "Verified"


async def test_a_store_that_is_away_is_asked_ever_less_often(store: MemoryStore) -> None:
    """A tenant's files make the store answer 503 -> the pauses double, and a changed spec is tried at once."""

    def away(key: str, bucket: str | None = None) -> ObjectInfo:
        raise StoreError("unavailable", f"{key}: 503")

    raw = version(store, "shop", "support")
    store.head = away  # type: ignore[method-assign]
    ctx = context(MemoryKube(raw), store)
    assert await settle(ctx) == backoff.FIRST and ready(raw)["reason"] == "StorageUnavailable"
    asked = len(store.requests)
    await reconcile(ctx, "shop", "support-1.0.0")
    assert len(store.requests) == asked
    del store.head  # type: ignore[attr-defined]
    raw["metadata"]["generation"] = 2
    await settle(ctx)
    assert ready(raw)["reason"] == "Verified"


async def test_files_are_read_once_until_they_change(store: MemoryStore) -> None:
    """A tenant deletes and creates the same Adapter again and again -> its bytes are read once, a changed file again."""
    raw = version(store, "shop", "support")
    ctx = context(MemoryKube(raw), store)
    for number in range(5):
        raw["status"], raw["metadata"]["uid"] = {}, "uid-shop-support"
        await settle(ctx)
        assert ready(raw)["reason"] == "Verified", number
    key = f"shop/adapters/support/1.0.0/{WEIGHTS}"
    assert store.read[key] == len(store.objects_[key])
    store.objects_[key] = bytes(len(store.objects_[key]))
    raw["status"] = {}
    await settle(ctx)
    assert ready(raw)["reason"] == "DigestMismatch" and store.read[key] == 2 * len(store.objects_[key])


async def test_a_file_that_is_swapped_while_it_is_read_is_not_remembered(store: MemoryStore) -> None:
    """A tenant shows a good file for the moment of the read -> the file that is there is read, and refused."""
    raw, key = version(store, "shop", "support"), f"shop/adapters/support/1.0.0/{WEIGHTS}"
    good, bad = store.objects_[key], bytes(len(store.objects_[key]))
    chunks = store.chunks

    def swapped(name: str, bucket: str | None = None, *, etag: str | None = None) -> Iterator[bytes]:
        store.objects_[key] = good
        try:
            yield from chunks(name, bucket, etag=etag)
        finally:
            store.objects_[key] = bad

    store.objects_[key] = bad
    ctx = context(MemoryKube(raw), store)
    store.chunks = swapped  # type: ignore[method-assign]
    await settle(ctx)
    assert ready(raw)["reason"] == "StorageUnavailable"
    store.chunks = chunks  # type: ignore[method-assign]
    raw["metadata"]["generation"] = 2
    await settle(ctx)
    assert ready(raw)["reason"] == "DigestMismatch"


# The places of the queue.


async def hold(queue_: Queue, namespaces: dict[str, int]) -> None:
    for namespace, count in namespaces.items():
        for number in range(count):
            queue_.wake("Adapter", namespace, f"a-{number}")
    await asyncio.sleep(0.05)


async def test_one_namespace_never_has_all_places_of_the_queue() -> None:
    """A tenant creates hundreds of resources whose reconciles hang -> others are reconciled at once."""
    done, never = [], asyncio.Event()

    async def reconcile_(namespace: str, name: str) -> float | None:
        if namespace == "greedy":
            await never.wait()
        done.append(namespace)
        return None

    queue_ = Queue({"Adapter": reconcile_})
    try:
        await hold(queue_, {"greedy": 300, "shop": 20, "desk": 1})
        assert len(queue_.busy) == queue.EACH
        assert done.count("shop") == 20 and done.count("desk") == 1
    finally:
        await queue_.stop()


async def test_many_small_reconciles_of_one_namespace_do_not_delay_another() -> None:
    """A tenant's 2000 resources are due at the same time -> the other's single one does not wait behind them."""
    order: list[str] = []

    async def reconcile_(namespace: str, name: str) -> float | None:
        await asyncio.sleep(0.001)
        order.append(namespace)
        return None

    queue_ = Queue({"Adapter": reconcile_})
    try:
        await hold(queue_, {"greedy": 2000, "shop": 1})
        await until(lambda: "shop" in order)
        assert order.index("shop") < 2 * queue.CONCURRENCY
    finally:
        await queue_.stop()


async def test_a_reconcile_that_hangs_is_ended_before_the_probe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's resource makes a reconcile hang -> it is ended and retried, and the operator is not restarted."""
    from graft.handlers import STUCK_AFTER

    assert queue.DEADLINE < STUCK_AFTER
    monkeypatch.setattr(queue, "DEADLINE", 0.05)
    ended, never = [], asyncio.Event()

    async def reconcile_(namespace: str, name: str) -> float | None:
        try:
            await never.wait()
        finally:
            ended.append(name)
        return None

    queue_ = Queue({"Adapter": reconcile_})
    try:
        queue_.wake("Adapter", "greedy", "a-1")
        await until(lambda: ended)
        assert not queue_.busy
    finally:
        await queue_.stop()


async def test_turns_are_given_round_robin_and_come_back_when_work_is_cancelled() -> None:
    """A tenant queues work and deletes it again -> no turn is lost, and namespaces take turns."""
    turns, order = Turns(2, 1), []

    async def work(namespace: str, seconds: float = 0.001) -> None:
        async with turns.turn(namespace):
            order.append(namespace)
            await asyncio.sleep(seconds)

    tasks = [asyncio.create_task(work(namespace, 60)) for namespace in ("greedy", "greedy", "other")]
    waiting = [asyncio.create_task(work("greedy")) for _ in range(5)]
    await asyncio.sleep(0.01)
    for task in [*waiting, *tasks]:
        task.cancel()
    await asyncio.gather(*tasks, *waiting, return_exceptions=True)
    assert order == ["greedy", "other"]
    order.clear()
    await asyncio.gather(*(work(namespace) for namespace in ["greedy"] * 4 + ["shop"] * 2 + ["desk"]))
    assert sorted(order[:3]) == ["desk", "greedy", "shop"], order
    assert not turns._waiting and not turns._held and not turns._served


async def test_transfers_of_one_namespace_leave_room_for_another() -> None:
    """A tenant's restorations take for ever -> another tenant's begins at once, and short calls have their own threads."""
    import threading

    gate, began, transfers = threading.Event(), [], Transfers()

    def hangs(name: str, stopped: Callable[[], bool]) -> None:
        began.append(name)
        gate.wait(30)

    try:
        for kind in ("restore", "verify", "delete"):
            for number in range(30):
                transfers.start(f"{kind}-{number}", kind, hangs, "greedy", namespace="greedy")
        await until(lambda: len(began) == 5)
        for kind in ("restore", "verify", "delete"):
            transfers.start(f"{kind}-shop", kind, hangs, kind, namespace="shop")
        await until(lambda: {"restore", "verify", "delete"} <= set(began))
        assert began.count("greedy") == 5
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 42), 2) == 42
        assert transfers.forget("verify-29") and transfers.find("verify-29") is None  # it had not begun
    finally:
        gate.set()
        transfers.stop()


# Planning.


def fleet(adapters: int, replicas: int, seed: int) -> tuple[list[Item], list[ReplicaPod]]:
    chance = random.Random(seed)
    items = [Item(f"i{number:03d}", chance.randint(1, 100) << 20) for number in range(adapters)]
    return items, [ReplicaPod(f"p{number:04d}") for number in range(replicas)]


@pytest.mark.parametrize(
    ("adapters", "replicas", "capacity"),
    [
        (80, 10, Capacity(bytes=300 << 20)),
        (128, 60, Capacity(bytes=130 << 20)),
        (128, 1000, Capacity(adapters=127)),
        (128, 1000, Capacity(adapters=120, bytes=6000 << 20)),
    ],
)
def test_planning_is_bounded(adapters: int, replicas: int, capacity: Capacity) -> None:
    """A tenant's adapters and limits make every placement hard -> planning and its advice end after a bounded work."""
    items, pods = fleet(adapters, replicas, 1)
    work, search = Work(), Work(replicaroom.WORK)
    started = time.process_time()
    first = plan(items, pods, capacity, {}, work=work)
    assert first.homes is not None and work.left > -replicas * adapters
    again = plan(items, pods, capacity, first.homes)
    assert again.homes is not None
    for pod in pods:
        here = [item.bytes for item in items if pod.name in again.homes[item.name]]
        assert capacity.adapters is None or len(here) <= capacity.adapters
        assert capacity.bytes is None or sum(here) <= capacity.bytes
    remedies(items, replicas, capacity)
    enough(items, replicas, capacity, search)
    assert time.process_time() - started < 20  # seconds on a busy machine; it was minutes


def test_a_lowered_limit_on_many_replicas_is_cheap() -> None:
    """A tenant lowers adaptersPerReplica from 127 to 1 on 1000 replicas -> the plan takes seconds at most."""
    items, pods = fleet(128, 1000, 1)
    everywhere = {item.name: [pod.name for pod in pods] for item in items}
    started = time.process_time()
    found = plan(items, pods, Capacity(adapters=1), everywhere)
    assert found.homes is not None and all(found.homes.values())
    assert time.process_time() - started < 20


async def test_planning_does_not_stop_the_event_loop() -> None:
    """A tenant has a deployment that is hard to plan -> the probe and the other reconciles go on meanwhile."""
    ctx = context(MemoryKube(), MemoryStore())
    spec = AdapterDeployment.model_validate(
        {"metadata": {"name": "chat", "namespace": "greedy"}, "spec": {"baseModel": "tiny", "adapters": ["a@latest"]}}
    )
    world = World(spec, None, None, [], pods=[{}] * 1000)
    items, pods = fleet(128, 60, 1)
    planning = [
        asyncio.create_task(_computed(ctx, world, plan, items, pods, Capacity(bytes=130 << 20), {})) for _ in range(3)
    ]
    longest, last = 0.0, time.monotonic()
    while not all(task.done() for task in planning):
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert all(task.result().homes for task in planning)
    assert longest < 0.5
    assert world.spec.metadata.namespace not in ctx.planning._held
