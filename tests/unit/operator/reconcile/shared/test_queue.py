"""The reconcile queue: it retries after every failure, and logs only real errors as errors."""

import asyncio
import logging

import pytest
from graft.kube import KubeError
from graft.reconcile.shared.queue import Queue


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
