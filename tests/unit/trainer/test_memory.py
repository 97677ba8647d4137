"""If memory runs out, the next attempt halves the micro-batch. The number of examples per step stays the same."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.progress import EXIT_CODES, Progress, Reason, Termination
from graft_trainer.__main__ import fail
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.prepare import prepare_container
from graft_trainer.run.earlier import memory_halvings
from graft_trainer.run.progress import ProgressReporter
from graft_trainer.run.run import Run
from torch.nn.modules.module import register_module_forward_pre_hook
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run

TOO_MUCH = 1 << 62  # bytes: more than any address space, since a kubelet lets Linux promise more memory than there is


pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def memory_for(most: int) -> Iterator[None]:
    """Let the model run out of memory if a training micro-batch has more than `most` examples."""

    def grab(module: torch.nn.Module, arguments: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and module.training and arguments[0].shape[0] > most:
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    hook = register_module_forward_pre_hook(grab)
    try:
        yield
    finally:
        hook.remove()


def attempt(root: Path, base: Path, store: MemoryStore, number: int, batch: int = 8) -> tuple[int, Progress]:
    """Run one attempt as a pod does. Return its exit code and its progress.json."""
    store.kept |= {"team-a/data/train.jsonl": chat_lines(24)}
    store.add_folder("models/tiny/", base)
    training = {"maxSteps": 2, "perDeviceTrainBatchSize": batch, "gradientAccumulationSteps": 1, "loggingSteps": 1}
    job = make_job(
        training=training,
        dataset={"train": {"uri": "s3://bucket/team-a/data/train.jsonl"}},
        evaluation={"maxSamples": 0},
    )
    run = make_run(root / str(number), store, job)
    name = f"pod-{number}"
    run.settings = dataclasses.replace(run.settings, attempt=name)
    run.progress = ProgressReporter(store, f"team-a/runs/uid-1/{name}/", name, interval=0.02)
    prepare_container(run)
    code = 0
    try:
        with run.cleanup:
            train_evaluate_publish(run)
    except Exception as error:
        code = fail(error, run, run.settings)
        told = Termination.model_validate_json(run.settings.termination_file.read_text())
        assert EXIT_CODES[told.reason] == code
    assert run.progress.close(5)
    return code, Progress.model_validate_json(store.kept[f"team-a/runs/uid-1/{name}/progress.json"])


def test_the_micro_batch_is_halved_until_it_fits(tmp_path: Path, base: Path) -> None:
    store = MemoryStore()
    seen = []
    with memory_for(1):
        for number in range(4):
            code, progress = attempt(tmp_path, base, store, number)
            training = progress.training or {}
            seen.append((code, training["perDeviceTrainBatchSize"], training["gradientAccumulationSteps"]))
    exceeded = EXIT_CODES[Reason.MEMORY_EXCEEDED]
    assert seen == [(exceeded, 8, 1), (exceeded, 4, 2), (exceeded, 2, 4), (0, 1, 8)]
    assert progress.stage == "Succeeded"
    first = Progress.model_validate_json(store.kept["team-a/runs/uid-1/pod-0/progress.json"])
    assert first.failure is not None
    assert "with 8 examples per micro-batch" in first.failure.message
    assert "halves the micro-batch" in first.failure.remedy


def test_if_one_example_does_not_fit_the_run_is_out_of_memory(tmp_path: Path, base: Path) -> None:
    store = MemoryStore()
    with memory_for(0):
        codes = [attempt(tmp_path, base, store, number, batch=2) for number in range(2)]
    assert [code for code, _ in codes] == [EXIT_CODES[Reason.MEMORY_EXCEEDED], EXIT_CODES[Reason.OUT_OF_MEMORY]]
    failure = codes[-1][1].failure
    assert failure is not None and failure.reason == Reason.OUT_OF_MEMORY
    assert "gradientCheckpointing" in failure.remedy


@pytest.mark.parametrize(
    ("told", "failed", "halvings"),
    [(0, [], 0), (2, [], 2), (0, [0], 1), (0, [0, 0], 1), (1, [1], 2), (3, [0, 1], 3)],
)
def test_halvings_include_attempts_that_the_operator_has_not_seen_yet(
    tmp_path: Path, told: int, failed: list[int], halvings: int
) -> None:
    store = MemoryStore()
    for number, used in enumerate(failed):
        progress = {
            "attempt": f"p{number}", "stage": "Failed", "updatedAt": "t", "training": {"halvings": used},
            "failure": {"reason": "MemoryExceeded", "message": "m", "remedy": "r"},
        }  # fmt: skip
        store.kept[f"team-a/runs/uid-1/p{number}/progress.json"] = json.dumps(progress).encode()
    run: Run = make_run(tmp_path, store, make_job(halvings=told))
    assert memory_halvings(run) == halvings
    run.progress.close(2)
