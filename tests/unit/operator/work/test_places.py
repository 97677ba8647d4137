"""A reconcile that waits for a lock holds no place, and gets one back before it goes on."""

import asyncio
from collections import Counter

from graft.reconcile.shared.queue import AWAY, CONCURRENCY, EACH, Queue
from graft.work.places import Locks, away


async def turn() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_reconciles_that_wait_for_a_lock_leave_the_places_to_others() -> None:
    """300 jobs wait for one lock -> few of them have begun, and other kinds and tenants are reconciled."""
    locks, free, done, at_once = Locks(), asyncio.Event(), list[str](), Counter[str]()

    async def job(namespace: str, name: str) -> float | None:
        async with locks.hold("version", namespace):
            at_once[namespace] += 1
            assert at_once[namespace] == 1
            await free.wait() if namespace == "greedy" else await asyncio.sleep(0)
            at_once[namespace] -= 1
        done.append(name)
        return None

    async def deployment(namespace: str, name: str) -> float | None:
        done.append(name)
        return None

    queue = Queue({"FineTuneJob": job, "AdapterDeployment": deployment})
    try:
        for number in range(300):
            queue.wake("FineTuneJob", "greedy", f"job-{number}")
        await turn()
        assert AWAY <= len(queue.busy) <= AWAY + EACH  # one holds the lock, the others are away
        assert queue._held == {"greedy": 1}
        queue.wake("AdapterDeployment", "greedy", "chat")
        queue.wake("FineTuneJob", "shop", "other")
        await turn()
        assert set(done) == {"chat", "other"}
        free.set()
        while len(done) < 302:
            await turn()
            assert queue._held.total() <= CONCURRENCY and queue._held["greedy"] <= EACH
        assert not queue._away and not locks._locks
    finally:
        await queue.stop()


async def test_a_reconcile_that_is_cancelled_while_it_waits_frees_everything() -> None:
    locks, never = Locks(), asyncio.Event()

    async def job(namespace: str, name: str) -> float | None:
        async with locks.hold("version"):
            await never.wait()
        return None

    queue = Queue({"FineTuneJob": job})
    names = [f"job-{number}" for number in range(5)]
    for name in names:
        queue.wake("FineTuneJob", "shop", name)
    await turn()
    for name in reversed(names):
        queue.forget("FineTuneJob", "shop", name)
    await turn()
    assert not queue._held and not queue._away and not queue._tasks and not locks._locks


async def test_parallel_parts_of_a_reconcile_share_its_place() -> None:
    """Two parts wait at the same time -> the place is given back once, and taken again when the last part returns."""
    first, second, held = asyncio.Event(), asyncio.Event(), list[int]()

    async def wait(event: asyncio.Event) -> None:
        async with away():
            await event.wait()

    async def reconcile(namespace: str, name: str) -> float | None:
        await asyncio.gather(wait(first), wait(second))
        held.append(queue._held["shop"])
        return None

    queue = Queue({"FineTuneJob": reconcile})
    try:
        queue.wake("FineTuneJob", "shop", "job")
        await turn()
        assert not queue._held
        first.set()
        await turn()
        assert not queue._held
        second.set()
        await turn()
        assert held == [1] and not queue._held and not queue._away
    finally:
        await queue.stop()
