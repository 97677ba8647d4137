"""Progress reaches the store in time, also after errors of the store, and never blocks training."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from graft.artifacts.storage import StoreError
from graft_trainer.run.progress import ProgressReporter
from worlds.trainer import MemoryStore


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.01)


def state(store: MemoryStore) -> dict[str, object]:
    return dict(json.loads(store.kept["run/progress.json"]))


def test_the_latest_state_wins_and_uploads_are_few() -> None:
    store = MemoryStore()
    reporter = ProgressReporter(store, "run/", "pod-1", interval=0.2)
    for step in range(500):
        reporter.update(step=step)
        reporter.event(step=step, loss=1.0)
    assert reporter.close(5)
    assert state(store)["step"] == 499
    assert len(store.kept["run/events.jsonl"].splitlines()) == 500
    assert store.written.count("run/progress.json") <= 4


def test_a_change_of_stage_does_not_wait_for_the_next_interval() -> None:
    store = MemoryStore()
    reporter = ProgressReporter(store, "run/", "pod-1", interval=60)
    reporter.update(step=1)
    until(lambda: "run/progress.json" in store.kept)
    reporter.update(step=2)
    reporter.stage("Training", total_steps=9)
    until(lambda: state(store)["stage"] == "Training")
    assert state(store) | {"updatedAt": ""} == {
        "attempt": "pod-1", "stage": "Training", "updatedAt": "", "step": 2, "totalSteps": 9, "percent": 0,
    }  # fmt: skip
    assert reporter.close(5)


def test_uploads_to_an_unavailable_store_are_retried_and_do_not_block(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    store.refuse["progress.json"] = "unavailable"
    reporter = ProgressReporter(store, "run/", "pod-1", interval=0.02)
    begin = time.monotonic()
    reporter.stage("Training")
    reporter.update(step=7)
    assert time.monotonic() - begin < 0.5
    time.sleep(0.2)
    store.refuse.clear()
    until(lambda: "run/progress.json" in store.kept)
    assert reporter.close(5)
    assert state(store)["step"] == 7
    assert caplog.text.count("could not be uploaded") == 1


def test_close_gives_up_after_its_time_limit(tmp_path: Path) -> None:
    class Hanging(MemoryStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            threading.Event().wait(20)
            raise StoreError("unavailable", "never")

    reporter = ProgressReporter(Hanging(), "run/", "pod-1", interval=0.01)
    reporter.stage("Failed")
    begin = time.monotonic()
    assert not reporter.close(0.3)
    assert time.monotonic() - begin < 2


def test_a_silent_reporter_keeps_the_state_and_uploads_nothing() -> None:
    store = MemoryStore()
    reporter = ProgressReporter(store, "run/", "pod-1", interval=0.01, silent=True)
    reporter.stage("Training", step=3)
    reporter.event(step=3)
    assert reporter.state.step == 3
    assert reporter.close(1)
    assert store.kept == {}
