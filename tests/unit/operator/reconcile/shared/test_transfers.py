"""Background work beside the reconciles: one transfer per resource, which stops when it is not wanted any more."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from graft.reconcile.shared.transfers import Transfers


def until_stopped(stopped: Callable[[], bool]) -> str:
    while not stopped():
        time.sleep(0.01)
    return "stopped"


async def finished(transfers: Transfers, uid: str) -> None:
    transfer = transfers.find(uid)
    assert transfer is not None
    await asyncio.wait({transfer._task}, timeout=10)
    assert transfer.done


async def test_a_result_is_kept_for_the_next_reconcile() -> None:
    transfers = Transfers()
    transfers.start("u", "compress", lambda number, stopped: number + 1, 41)
    await finished(transfers, "u")
    transfer = transfers.find("u")
    assert transfer is not None and transfer.result() == 42
    assert transfers.forget("u") and transfers.find("u") is None


async def test_the_error_of_a_transfer_is_its_result() -> None:
    def fails(stopped: Callable[[], bool]) -> None:
        raise OSError("the store is away")

    transfers = Transfers()
    transfers.start("u", "compress", fails)
    await finished(transfers, "u")
    transfer = transfers.find("u")
    assert transfer is not None
    with pytest.raises(OSError, match="the store is away"):
        transfer.result()


async def test_a_transfer_is_stopped_before_it_is_forgotten() -> None:
    transfers = Transfers()
    transfers.start("u", "compress", until_stopped)
    await asyncio.sleep(0.05)
    assert not transfers.forget("u"), "the thread of the transfer is still writing"
    await finished(transfers, "u")
    assert transfers.forget("u")
    assert transfers.forget("never heard of")


async def test_a_restoration_does_not_wait_for_a_compression() -> None:
    transfers, ended = Transfers(), threading.Event()
    transfers.start("a", "compress", until_stopped)
    transfers.start("b", "compress", lambda stopped: ended.set())
    transfers.start("c", "restore", lambda stopped: "restored")
    await finished(transfers, "c")
    assert not ended.is_set(), "only one compression runs at a time"
    transfers.stop()
    for uid in ("a", "b"):
        await finished(transfers, uid)
