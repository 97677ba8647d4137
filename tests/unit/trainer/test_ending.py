"""When its version is published, a run keeps no checkpoints, even if another attempt published it or still runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.manifest import Manifest
from graft.artifacts.storage import StoreError, Trouble
from graft.contracts.progress import Progress, Reason
from graft_trainer import pipeline
from graft_trainer.checkpoints.checkpoint import Receipt
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.processes import distributed
from graft_trainer.run.failures import Failure, Interrupted
from graft_trainer.run.run import Run
from worlds.trainer import MemoryStore, make_job, ready

RUN = "team-a/runs/uid-1/"
MANIFEST = "team-a/adapters/colours/1.0.0/manifest.json"
FINAL = RUN + "pod-1/checkpoints/step-000003-final/rank-0000"
RECIPE: dict[str, Any] = {
    "training": {"maxSteps": 3, "saveSteps": 1, "saveTotalLimit": 9, "perDeviceTrainBatchSize": 4},
    "evaluation": {"maxSamples": 0},
}


pytestmark = pytest.mark.usefixtures("quick")


class WatchedStore(MemoryStore):
    """Records deletions, can refuse them, and calls a function before each one."""

    def __init__(self, kept: dict[str, bytes] | None = None) -> None:
        super().__init__(kept)
        self.deleted: list[str] = []
        self.refuse_delete: dict[str, Trouble] = {}
        self.before_delete: Callable[[str], None] = lambda key: None

    def delete(self, key: str) -> None:
        self.before_delete(key)
        for part, trouble in self.refuse_delete.items():
            if part in key:
                raise StoreError(trouble, f"s3://bucket/{key}: {trouble}")
        super().delete(key)
        self.deleted.append(key)

    def checkpoints(self) -> list[str]:
        return [key for key in self.kept if "/checkpoints/" in key]


def attempt(root: Path, base: Path, store: WatchedStore | None = None, **changes: Any) -> tuple[Run, WatchedStore]:
    given, _ = ready(root / "data", base, make_job())
    store = store or WatchedStore(given.store.kept)  # type: ignore[attr-defined]
    run, _ = ready(root, base, make_job(**RECIPE | changes), store)
    return run, store


def go(run: Run) -> Progress:
    with run.cleanup:
        train_evaluate_publish(run)
    assert run.progress.close(5)
    return Progress.model_validate_json(run.store.get(f"{RUN}{run.settings.attempt}/progress.json"))


def leave_checkpoint(store: WatchedStore, name: str = "pod-0", step: int = 2) -> None:
    """Store the checkpoint of an earlier attempt, and the part of another that it did not finish."""
    prefix = f"{RUN}{name}/checkpoints/step-{step:06d}/"
    receipt = Receipt(step=step, rank=0, world_size=1, of="other", size=4, sha256="", created_at="2026-01-01T00:00:00Z")
    store.kept[prefix + "rank-0000.safetensors"] = b"data"
    store.kept[prefix + "rank-0000.json"] = receipt.json_text().encode()
    store.kept[f"{RUN}{name}/checkpoints/step-{step + 1:06d}/rank-0000.safetensors"] = b"da"


def test_a_run_that_has_published_keeps_no_checkpoints(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path, base)
    leave_checkpoint(store)
    early: list[str] = []
    store.before_delete = lambda key: None if MANIFEST in store.kept else early.append(key)
    progress = go(run)
    assert store.checkpoints() == early == []
    assert (progress.stage, progress.step, progress.checkpoints) == ("Succeeded", 3, [])
    gone = [key for key in store.deleted if "/checkpoints/" in key]
    receipts = [key for key in gone if key.endswith(".json")]
    assert receipts and gone[: len(receipts)] == receipts, (
        "receipts must be deleted first, so that a partly deleted checkpoint is not complete"
    )
    assert {key.split("/")[3] for key in gone} == {"pod-0", "pod-1"}
    assert f"{RUN}pod-1/events.jsonl" in store.kept and f"{RUN}version.json" in store.kept


def test_the_run_waits_for_the_last_upload_of_a_checkpoint(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path, base)

    def slow(key: str, path: Path) -> None:
        if "-final" in key:
            while MANIFEST not in store.kept:
                time.sleep(0.05)
        store.upload(key, path)

    run.upload = slow
    assert go(run).checkpoints == []
    assert FINAL + ".json" in store.deleted and store.checkpoints() == []


def test_a_rejected_version_is_published_and_its_checkpoints_are_deleted(tmp_path: Path, base: Path) -> None:
    gate = {"metric": "evalLoss", "max": 0.0001}
    run, store = attempt(tmp_path, base, evaluation={"maxSamples": 0, "gates": [gate]})
    progress = go(run)
    assert progress.rejected and Manifest.model_validate_json(store.kept[MANIFEST]).rejected
    assert store.checkpoints() == [] == progress.checkpoints


def test_the_next_attempt_deletes_checkpoints_that_a_published_attempt_has_left(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path / "first", base)
    go(run)
    leave_checkpoint(store, "pod-1")
    again, _ = attempt(tmp_path / "again", base, store)
    progress = go(again)
    assert store.checkpoints() == []
    assert (progress.stage, progress.checkpoints) == ("Succeeded", [])


def test_only_rank_0_deletes_the_checkpoints(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = attempt(tmp_path / "first", base)
    go(run)
    leave_checkpoint(store, "pod-1")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    again, _ = attempt(tmp_path / "again", base, store)
    train_evaluate_publish(again)
    assert store.checkpoints()


@pytest.mark.parametrize("trouble", ["denied", "unavailable"])
def test_checkpoints_that_cannot_be_deleted_are_logged_and_the_run_succeeds(
    tmp_path: Path, base: Path, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    run, store = attempt(tmp_path, base)
    store.refuse_delete["step-000003-final"] = trouble
    progress = go(run)
    assert progress.stage == "Succeeded" and progress.manifest_digest
    assert "checkpoints could not be deleted" in caplog.text
    assert [(ref.attempt, ref.step) for ref in progress.checkpoints or ()] == [("pod-1", 3)]
    receipts = [key for key in store.checkpoints() if key.endswith(".json")]
    assert receipts == [FINAL + ".json"], "the receipts of the earlier checkpoints must be deleted"


def test_a_run_that_is_interrupted_while_it_deletes_checkpoints_has_succeeded(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path, base)

    def asked(key: str) -> None:
        if "/checkpoints/" in key:
            run.interruption.wanted = True

    store.before_delete = asked
    assert go(run).stage == "Succeeded"
    assert store.checkpoints() == [] and run.interruption.wanted


def publish_as_another(root: Path, base: Path, store: WatchedStore) -> None:
    other, _ = attempt(root, base, store)
    go(other)


def test_an_attempt_succeeds_if_another_publishes_and_deletes_the_checkpoint_that_it_reads(
    tmp_path: Path, base: Path
) -> None:
    run, store = attempt(tmp_path, base)
    first, _ = attempt(tmp_path / "first", base, store)

    def dies(*_: Any) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft_trainer.evaluation.evaluate.evaluate", dies)
        with pytest.raises(Interrupted):
            go(first)
    assert FINAL + ".json" in store.kept

    reads = store.download

    def gone_midway(*what: Any, **how: Any) -> None:
        if MANIFEST not in store.kept:
            store.download = reads  # type: ignore[method-assign]
            publish_as_another(tmp_path / "second", base, store)
        reads(*what, **how)

    store.download = gone_midway  # type: ignore[method-assign]
    progress = go(run)
    assert (progress.stage, progress.checkpoints) == ("Succeeded", [])
    assert store.checkpoints() == []


def test_a_receipt_that_is_deleted_between_listing_and_reading_is_ignored(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path, base)
    leave_checkpoint(store)
    read = store.get

    def gone(key: str, bucket: str | None = None, **how: Any) -> bytes:
        if key.endswith("pod-0/checkpoints/step-000002/rank-0000.json"):
            store.kept.pop(key, None)
        return read(key, bucket, **how)

    store.get = gone  # type: ignore[method-assign]
    assert not pipeline.trained_to_the_end(run)


def test_a_run_without_a_published_version_reports_its_own_failure(tmp_path: Path, base: Path) -> None:
    run, store = attempt(tmp_path, base, method={"lora": {"rank": 512}})
    leave_checkpoint(store)
    with pytest.raises(Failure, match="rank is 512") as caught:
        go(run)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    assert store.checkpoints()
