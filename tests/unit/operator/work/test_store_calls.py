"""Short calls of the store: a store that does not answer costs one call, and no other namespace."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from graft.artifacts.storage import StoreError
from graft.reconcile.shared.queue import Queue
from graft.work.storecalls import EACH, SILENCE, StoreCalls


async def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not there():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)


class Store:
    """A store that counts what it is asked, and answers as `behave` says."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.behave: Callable[[], str] = lambda: "answer"

    def ask(self, what: str) -> str:
        self.asked.append(what)
        return self.behave()


def silent() -> str:
    raise StoreError("unavailable", "Read timeout on endpoint URL", answered=False)


def busy() -> str:
    raise StoreError("unavailable", "503 SlowDown")


async def test_a_store_that_does_not_answer_is_asked_once_until_it_may_answer_again() -> None:
    now, store = 100.0, Store()
    calls = StoreCalls(lambda: now)
    store.behave = silent
    for _ in range(20):
        with pytest.raises(StoreError, match="Read timeout") as raised:
            await calls.run("shop", store.ask, "shop")
        assert raised.value.trouble == "unavailable"
    assert store.asked == ["shop"]
    now += SILENCE + 1
    found = await asyncio.gather(*(calls.run("shop", store.ask, "again") for _ in range(5)), return_exceptions=True)
    assert all(isinstance(each, StoreError) for each in found) and store.asked == ["shop", "again"]
    now += SILENCE + 1
    store.behave = lambda: "answer"
    assert await calls.run("shop", store.ask, "shop") == "answer" == await calls.run("shop", store.ask, "shop")


async def test_one_namespace_does_not_end_the_calls_of_another() -> None:
    store = Store()
    calls = StoreCalls()
    store.behave = silent
    with pytest.raises(StoreError):
        await calls.run("greedy", store.ask, "greedy")
    store.behave = lambda: "answer"
    assert await calls.run("shop", store.ask, "shop") == "answer"


async def test_an_answer_that_is_an_error_is_asked_again() -> None:
    store = Store()
    calls = StoreCalls()
    store.behave = busy
    for _ in range(3):
        with pytest.raises(StoreError, match="SlowDown"):
            await calls.run("shop", store.ask, "shop")
    assert len(store.asked) == 3


async def test_calls_that_hang_hold_neither_the_threads_of_others_nor_a_place() -> None:
    """A tenant's calls hang -> they hold the tenant's share of the threads; its other kinds and others go on."""
    gate, calls, began, done = threading.Event(), StoreCalls(), list[str](), list[str]()

    def hang(name: str) -> None:
        began.append(name)
        gate.wait(30)

    async def job(namespace: str, name: str) -> float | None:
        await calls.run(namespace, hang if namespace == "greedy" else began.append, namespace)
        done.append(name)
        return None

    async def deployment(namespace: str, name: str) -> float | None:
        done.append(name)
        return None

    queue = Queue({"FineTuneJob": job, "AdapterDeployment": deployment})
    try:
        for number in range(100):
            queue.wake("FineTuneJob", "greedy", f"job-{number}")
        await until(lambda: began.count("greedy") == EACH)
        queue.wake("FineTuneJob", "shop", "other")
        queue.wake("AdapterDeployment", "greedy", "chat")
        await until(lambda: {"other", "chat"} <= set(done))
        assert began.count("greedy") == EACH and not queue._held
        gate.set()
        await until(lambda: len(done) == 102)
        assert not queue._away
    finally:
        gate.set()
        await queue.stop()


async def test_a_call_that_nobody_waits_for_any_more_keeps_its_thread() -> None:
    gate, calls, began = threading.Event(), StoreCalls(), list[int]()
    try:
        for number in range(EACH + 1):
            task = asyncio.create_task(calls.run("shop", lambda: (began.append(1), gate.wait(30))))
            await asyncio.sleep(0.01)
            if number < EACH:
                task.cancel()
        await asyncio.sleep(0.05)
        assert len(began) == EACH, "the threads of cancelled calls still run"
        gate.set()
        await asyncio.wait_for(task, 10)
    finally:
        gate.set()
