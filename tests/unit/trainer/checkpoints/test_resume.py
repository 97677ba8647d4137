"""A run that is killed or interrupted resumes from its newest checkpoint. Its result is that of an undisturbed run."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_trainer.loop.watch import Watch
from graft_trainer.run.failures import Interrupted
from worlds.checkpoints import ROOT, Attempt, FolderStore, Killed, open_attempt, run_attempt


def same(one: Attempt, other: Attempt) -> None:
    assert one.learned is not None and other.learned is not None, (one.ended, other.ended)
    assert one.learned.curve == other.learned.curve
    assert one.learned.tokens == other.learned.tokens
    assert one.learned.learned_tokens == other.learned.learned_tokens > 0
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)


def steps_of(store: FolderStore, name: str, value: str) -> list[int]:
    """Return the steps for which events.jsonl has this value."""
    events = [json.loads(line) for line in store.get(f"{ROOT}{name}/events.jsonl").splitlines()]
    return [event["step"] for event in events if value in event]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    root = tmp_path_factory.mktemp("undisturbed")
    done = run_attempt(root, FolderStore(root / "store"), "pod-0", held_out=5, eval_steps=6)
    if done.ended is not None:
        raise done.ended
    return done


def test_a_run_that_is_killed_and_interrupted_ends_like_an_undisturbed_run(
    tmp_path: Path, undisturbed: Attempt
) -> None:
    store = FolderStore(tmp_path / "store")
    # 22 examples, 4 a step: an epoch has 6 steps and 11 micro-batches. The attempts end in this order:
    # killed at the start of an epoch, interrupted within an epoch, killed before a new checkpoint is saved,
    # interrupted in the first half of a step, and interrupted in the last step but one.
    disturbances: list[dict[int, Any]] = [{12: "kill"}, {13: "term"}, {1: "kill"}, {8: "term"}, {1: "term"}]
    steps = []
    for number, events in enumerate(disturbances):
        ended = run_attempt(tmp_path, store, f"pod-{number}", events=events, held_out=5, eval_steps=6)
        assert isinstance(ended.ended, Killed | Interrupted), ended.ended
        steps.append(ended.progress.resumed_from)
    assert steps == [None, 4, 11, 11, 16]
    done = run_attempt(tmp_path, store, "pod-9", held_out=5, eval_steps=6)
    same(done, undisturbed)
    assert done.learned is not None and undisturbed.learned is not None
    assert done.learned.held_out_curve == undisturbed.learned.held_out_curve
    assert done.progress.resumed_from == 17
    assert [ref.step for ref in done.progress.checkpoints or ()] == [17, 18]
    assert steps_of(store, "pod-9", "loss") == list(range(1, 19))
    assert steps_of(store, "pod-9", "evalLoss") == [6, 12]


def test_records_over_several_steps_do_not_depend_on_where_the_run_was_interrupted(tmp_path: Path) -> None:
    whole = run_attempt(tmp_path, FolderStore(tmp_path / "whole"), "pod-0", logging_steps=5)
    store = FolderStore(tmp_path / "cut")
    run_attempt(tmp_path, store, "pod-1", logging_steps=5, events={14: "term"})
    same(run_attempt(tmp_path, store, "pod-2", logging_steps=5), whole)


@pytest.mark.parametrize("optim", ["adafactor", "adamw"])
@pytest.mark.parametrize("scheduler", ["polynomial", "inverse_sqrt", "cosine_with_restarts", "constant_with_warmup"])
def test_every_optimizer_and_schedule_resumes(tmp_path: Path, optim: str, scheduler: str) -> None:
    changes = {"optim": optim, "lr_scheduler_type": scheduler, "max_steps": 5, "full": True}
    whole = run_attempt(tmp_path, FolderStore(tmp_path / "whole"), "pod-0", **changes)
    store = FolderStore(tmp_path / "cut")
    assert isinstance(run_attempt(tmp_path, store, "pod-1", events={5: "term"}, **changes).ended, Interrupted)
    same(run_attempt(tmp_path, store, "pod-2", **changes), whole)


def test_a_halved_micro_batch_resumes_at_the_same_example(tmp_path: Path) -> None:
    whole = run_attempt(tmp_path, FolderStore(tmp_path / "whole"), "pod-0", full=True)
    store = FolderStore(tmp_path / "cut")
    run_attempt(tmp_path, store, "pod-1", full=True, events={17: "kill"})
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    done = run_attempt(tmp_path, store, "pod-2", full=True, **halved)
    assert done.progress.resumed_from == 8
    assert done.learned is not None and whole.learned is not None
    assert done.learned.tokens == whole.learned.tokens
    for one, other in zip(done.learned.curve, whole.learned.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_losses_of_a_t5_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    # T5's own loss is the mean over a micro-batch. It ignores the given number of tokens.
    curves = []
    for batch in (1, 4):
        name = f"by-{batch}"
        done = run_attempt(
            tmp_path, FolderStore(tmp_path / name / "store"), name, t5={"tied": True}, max_steps=8,
            per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
        )  # fmt: skip
        assert done.learned is not None, done.ended
        curves.append([record["loss"] for record in done.learned.curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0] < 10


def test_a_finished_training_is_not_repeated(tmp_path: Path, undisturbed: Attempt) -> None:
    store = FolderStore(tmp_path / "store")
    first = run_attempt(tmp_path, store, "pod-1", held_out=5, eval_steps=6)
    second = run_attempt(tmp_path, store, "pod-2", held_out=5, eval_steps=6, events={1: "kill"})
    same(second, undisturbed)
    assert first.learned is not None and second.learned is not None
    assert second.learned.held_out_curve == first.learned.held_out_curve
    assert [record["step"] for record in first.learned.held_out_curve] == [6, 12]
    assert (second.progress.percent, second.progress.resumed_from) == (100, 18)


def test_an_interrupt_in_the_last_step_keeps_the_trained_weights(tmp_path: Path, undisturbed: Attempt) -> None:
    store = FolderStore(tmp_path / "store")
    assert isinstance(run_attempt(tmp_path, store, "pod-1", events={33: "term"}).ended, Interrupted)
    done = run_attempt(tmp_path, store, "pod-2", events={1: "kill"})
    assert done.ended is None and done.progress.resumed_from == 18


def test_a_checkpoint_does_not_wait_for_the_evaluation_of_its_step(tmp_path: Path, undisturbed: Attempt) -> None:
    store = FolderStore(tmp_path / "store")
    settings: dict[str, Any] = {"held_out": 5, "eval_steps": 6, "save_steps": 6}
    first = run_attempt(tmp_path, store, "pod-1", measuring={2: "kill"}, **settings)
    assert isinstance(first.ended, Killed)
    assert [ref.step for ref in first.progress.checkpoints or ()] == [6]
    # The next attempt runs the missing evaluation before its next step.
    second = run_attempt(tmp_path, store, "pod-2", measuring={4: "term"}, **settings)
    assert isinstance(second.ended, Interrupted) and second.progress.resumed_from == 6
    done = run_attempt(tmp_path, store, "pod-3", **settings)
    same(done, undisturbed)
    assert done.progress.resumed_from == 12
    assert steps_of(store, "pod-3", "evalLoss") == [6, 12]


def test_an_interrupt_stops_a_running_evaluation(tmp_path: Path, undisturbed: Attempt) -> None:
    store = FolderStore(tmp_path / "store")
    settings: dict[str, Any] = {"held_out": 5, "eval_steps": 6}
    batches: list[int] = []  # the batches of an evaluation that were measured after the interrupt
    for name, asked, step in (("pod-1", {1: "term"}, 6), ("pod-2", {2: "term"}, 6), ("pod-3", {5: "term"}, 12)):
        after = {at: (lambda at=at: batches.append(at)) for at in range(max(asked) + 1, 9)}
        ended = run_attempt(tmp_path, store, name, measuring=asked | after, **settings)
        assert isinstance(ended.ended, Interrupted), ended.ended
        assert [ref.step for ref in ended.progress.checkpoints or ()][-1] == step
    assert batches == []
    done = run_attempt(tmp_path, store, "pod-4", **settings)
    same(done, undisturbed)
    assert (done.progress.resumed_from, steps_of(store, "pod-4", "evalLoss")) == (12, [6, 12])


def test_training_continues_while_a_checkpoint_is_uploaded(tmp_path: Path) -> None:
    three_more = threading.Event()

    class Slow(FolderStore):
        def upload(self, key: str, path: Path) -> None:
            assert three_more.wait(30), "training must continue during the upload"
            super().upload(key, path)

    store = Slow(tmp_path / "store")
    # The upload is that of step 4. The 14th micro-batch belongs to step 8.
    done = run_attempt(tmp_path, store, "pod-1", events={14: three_more.set})
    assert done.ended is None, done.ended
    assert three_more.is_set()
    # The checkpoint of step 8 was due during the upload of step 4. It was taken at the next possible step.
    assert [ref.step for ref in done.progress.checkpoints or ()][-1] == 18


def test_a_store_that_refuses_checkpoints_does_not_end_training(
    tmp_path: Path, undisturbed: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FolderStore):
        broken = True

        def upload(self, key: str, path: Path) -> None:
            if self.broken:
                raise OSError("connection reset")
            super().upload(key, path)

    store = Broken(tmp_path / "store")

    def mended() -> None:
        store.broken = False

    done = run_attempt(tmp_path, store, "pod-1", held_out=5, eval_steps=6, events={16: mended})
    same(done, undisturbed)
    assert "could not be written, training continues and the next one will be tried: connection reset" in caplog.text
    assert 18 in [ref.step for ref in done.progress.checkpoints or ()]


def test_without_save_steps_checkpoints_follow_the_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    often = open_attempt(tmp_path, store, "pod-1", checkpoint_seconds=0.0)
    run_attempt(tmp_path, store, "pod-1", run=often, save_steps=None, save_total_limit=100, events={16: "kill"})
    seldom = open_attempt(tmp_path, store, "pod-2", checkpoint_seconds=3600.0)
    done = run_attempt(tmp_path, store, "pod-2", run=seldom, save_steps=None, save_total_limit=100)
    assert (done.progress.resumed_from or 0) > 0
    own = [ref.step for ref in done.progress.checkpoints or () if ref.attempt == "pod-2"]
    assert own == [18]


def test_speed_and_remaining_time_count_only_this_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Watch] = []

    class SeenWatch(Watch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            watches.append(self)

    monkeypatch.setattr("graft_trainer.loop.loop.Watch", SeenWatch)
    store = FolderStore(tmp_path / "store")
    run_attempt(tmp_path, store, "pod-1", events={20: "term"})
    done = run_attempt(tmp_path, store, "pod-2")
    assert done.learned is not None and done.learned.seconds > 0
    # If the earlier attempt's steps counted, all of them would count as the first step of this attempt.
    assert watches[-1].pace._marks[0][1] >= 10
