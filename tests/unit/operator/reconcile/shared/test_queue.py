"""The reconcile queue: it retries after every failure, and logs only real errors as errors."""

import asyncio
import logging
from collections import Counter

import pytest
from graft.kube import KubeError
from graft.reconcile.shared.queue import CONCURRENCY, EACH, SHARE_LATER, Queue


async def looks(*outcomes: Exception | None) -> None:
    """Reconcile one resource once for each outcome. An outcome is an exception to raise, or None."""
    left, done = list(outcomes), asyncio.Event()

    async def reconcile(namespace: str, name: str) -> float | None:
        outcome = left.pop(0)
        if not left:
            done.set()
        if outcome is not None:
            raise outcome
        return None

    queue = Queue({"Adapter": reconcile})
    queue.wake("Adapter", "shop", "support-1.0.0")
    try:
        await asyncio.wait_for(done.wait(), 10)
    finally:
        await queue.stop()


async def test_a_write_conflict_is_retried_and_not_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await looks(KubeError(409, "Conflict", "the object has been modified"), None)
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_an_error_is_logged_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    await looks(KubeError(500, "InternalError", "etcd is away"), None)
    assert [(record.levelname, record.error) for record in caplog.records] == [("ERROR", "etcd is away")]


class Gate:
    """A reconcile that waits until it is opened. `order` holds the names in the order in which they began."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.open = asyncio.Event()

    async def __call__(self, namespace: str, name: str) -> float | None:
        self.order.append(name)
        await self.open.wait()
        return None


async def turn() -> None:
    """Let everything run that can run now."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_wakes_during_a_reconcile_cause_exactly_one_more() -> None:
    gate = Gate()
    queue = Queue({"Adapter": gate})
    try:
        for _ in range(3):
            queue.wake("Adapter", "shop", "a")
        await turn()
        for _ in range(3):
            queue.wake("Adapter", "shop", "a")
        await turn()
        assert gate.order == ["a"], "a resource has one writer"
        gate.open.set()
        await turn()
        assert gate.order == ["a", "a"]
    finally:
        await queue.stop()


async def test_a_resource_that_waits_costs_no_task() -> None:
    gate = Gate()
    queue = Queue({"Adapter": gate})
    before = len(asyncio.all_tasks())
    try:
        for number in range(10_000):
            queue.wake("Adapter", f"n{number % 10}", f"a{number}")
        await turn()
        assert len(asyncio.all_tasks()) - before == CONCURRENCY == len(queue.busy)
        assert len(queue.keys("Adapter")) == 10_000 and len(queue.keys("Adapter", "n3")) == 1_000
        assert ("Adapter", "n3", "a3") in queue and ("Adapter", "n4", "a3") not in queue
        gate.open.set()
        while len(gate.order) < 10_000:
            await turn()
        await turn()
        assert len(asyncio.all_tasks()) == before
    finally:
        await queue.stop()


async def test_what_a_user_changed_is_reconciled_before_what_can_wait() -> None:
    gate = Gate()
    queue = Queue({"Adapter": gate, "FineTuneJob": gate})
    try:
        for number in range(100):
            queue.wake("FineTuneJob", f"n{number}", f"old-{number}", later=True)
        await turn()
        for number in range(50):
            queue.wake("Adapter", f"n{number}", f"new-{number}")
        queue.wake("FineTuneJob", "n99", "old-99")  # its user changes it
        gate.order.clear()
        gate.open.set()
        while len(gate.order) < 134:
            await turn()
        new = [place for place, name in enumerate(gate.order) if name.startswith("new") or name == "old-99"]
        assert max(new) < 51 + 51 // (SHARE_LATER - 1) + 1, "the others waited first"
        assert any(name.startswith("old") and name != "old-99" for name in gate.order[:10]), "nothing may starve"
    finally:
        await queue.stop()


async def test_a_deployment_does_not_wait_behind_the_jobs_of_its_namespace() -> None:
    order: list[str] = []

    async def reconcile(namespace: str, name: str) -> float | None:
        order.append(name)
        await asyncio.sleep(0)
        return None

    queue = Queue({"FineTuneJob": reconcile, "AdapterDeployment": reconcile})
    try:
        for number in range(300):
            queue.wake("FineTuneJob", "shop", f"job-{number}")
        queue.wake("AdapterDeployment", "shop", "chat")
        while len(order) < 301:
            await turn()
        assert order.index("chat") < 2 * EACH
    finally:
        await queue.stop()


async def test_a_forgotten_resource_is_cancelled_and_can_come_back() -> None:
    gate = Gate()
    queue = Queue({"Adapter": gate})
    try:
        queue.wake("Adapter", "shop", "a")
        queue.forget("Adapter", "shop", "a")  # before its task has begun
        await turn()
        assert gate.order == [] and not queue.busy and ("Adapter", "shop", "a") not in queue
        queue.wake("Adapter", "shop", "a")
        await turn()
        queue.forget("Adapter", "shop", "a")
        queue.wake("Adapter", "shop", "a")
        await turn()
        assert gate.order == ["a", "a"]
        assert not queue._held - Counter({"shop": 1})
    finally:
        await queue.stop()
    assert not queue._held and not queue._tasks and not queue._away


async def test_a_conflict_is_retried_sooner_than_an_error() -> None:
    begun: dict[str, list[float]] = {"conflict": [], "error": []}
    clock = asyncio.get_running_loop()

    async def reconcile(namespace: str, name: str) -> float | None:
        begun[name].append(clock.time())
        raise KubeError(409 if name == "conflict" else 500, "", name)

    queue = Queue({"Adapter": reconcile})
    try:
        queue.wake("Adapter", "shop", "conflict")
        queue.wake("Adapter", "shop", "error")
        while len(begun["error"]) < 2:
            await asyncio.sleep(0.01)
            queue.wake("Adapter", "shop", "error")  # events do not make it a hot loop
        assert len(begun["conflict"]) > 3
        assert begun["error"][1] - begun["error"][0] > 0.7
    finally:
        await queue.stop()


async def test_timers_of_resources_that_events_wake_do_not_add_up() -> None:
    async def reconcile(namespace: str, name: str) -> float | None:
        return None

    queue = Queue({"Adapter": reconcile})
    try:
        for _ in range(500):
            queue.wake("Adapter", "shop", "a")
            queue.wake("Adapter", "shop", "b")
            await turn()
        assert len(queue._timers) < 100
    finally:
        await queue.stop()


async def test_the_queue_shows_how_long_resources_wait() -> None:
    gate = Gate()
    queue = Queue({"Adapter": gate})
    try:
        for number in range(EACH + 2):
            queue.wake("Adapter", "shop", f"support-{number}")
        await turn()
        assert len(queue.waiting()) == 2 and min(queue.waiting()) >= 0
        queue.forget("Adapter", "shop", f"support-{EACH}")
        assert len(queue.waiting()) == 1
        gate.open.set()
        await turn()
        assert queue.waiting() == []
    finally:
        await queue.stop()


async def test_changes_of_children_within_a_moment_cause_one_reconcile() -> None:
    begun: list[float] = []
    clock = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    async def reconcile(namespace: str, name: str) -> float | None:
        begun.append(clock.time())
        (second if first.is_set() else first).set()
        await asyncio.sleep(0.01 if len(begun) == 1 else 0)
        return None

    queue = Queue({"FineTuneJob": reconcile})
    try:
        queue.wake("FineTuneJob", "shop", "tune")
        await first.wait()
        for _ in range(5):  # some arrive while it is reconciled, some later
            queue.wake("FineTuneJob", "shop", "tune", after=0.1)
            await asyncio.sleep(0.005)
        await asyncio.wait_for(second.wait(), 5)
        assert len(begun) == 2 and begun[1] - begun[0] > 0.09
        queue.wake("FineTuneJob", "shop", "tune", after=60)
        queue.wake("FineTuneJob", "shop", "tune")  # its user changes it
        await turn()
        assert len(begun) == 3
    finally:
        await queue.stop()


async def test_a_resource_that_is_over_leaves_the_queue_after_its_reconcile() -> None:
    over: set[str] = set()
    retried = asyncio.Event()

    async def reconcile(namespace: str, name: str) -> float | None:
        if name == "fails" and name not in over:
            over.add(name)
            raise ValueError
        over.add(name)
        if name == "fails":
            retried.set()
        return None

    queue = Queue({"FineTuneJob": reconcile}, over=lambda key: key[2] in over)
    try:
        queue.wake("FineTuneJob", "shop", "ends")
        queue.wake("FineTuneJob", "shop", "fails")
        await turn()
        assert queue.keys("FineTuneJob") == [("FineTuneJob", "shop", "fails")] and len(queue._due) == 1
        queue.wake("FineTuneJob", "shop", "ends")  # it is restarted
        over.clear()
        assert ("FineTuneJob", "shop", "ends") in queue
        over.update({"ends", "fails"})
        await asyncio.wait_for(retried.wait(), 5)
        await turn()
        assert queue.keys("FineTuneJob") == []
    finally:
        await queue.stop()
    assert not queue._due and not queue._failures
