"""The stage of a FineTuneJob, while its pod goes from one stage to the next."""

from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.contracts.progress import Progress
from graft.reconcile.finetunejob.jobstatus import World, observe, polled

JOB = {
    "apiVersion": "graft.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "support", "namespace": "shop", "uid": "1", "generation": 1},
    "spec": {
        "baseModel": "tiny",
        "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
        "output": {"adapter": "support"},
        "method": {"lora": {}},
    },
}


def pod(**states: dict[str, Any]) -> dict[str, Any]:
    """Return a pod whose containers have these states."""
    statuses = {name: [{"name": name, "state": state}] for name, state in states.items()}
    return {
        "metadata": {"name": "support-1"},
        "status": {
            "phase": "Running",
            "initContainerStatuses": statuses.get("prepare", []),
            "containerStatuses": statuses.get("train", []),
        },
    }


RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
DONE = {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T00:00:00Z"}}
TRAIN = pod(prepare=DONE, train=RUNNING)


def progress(stage: str) -> Progress:
    return Progress.model_validate({"attempt": "support-1", "stage": stage, "updatedAt": "2026-01-01T00:00:00Z"})


@pytest.mark.parametrize(
    ("found", "reported", "shown"),
    [
        (pod(prepare=RUNNING), "Preparing", "Preparing"),
        (TRAIN, "Preparing", "Training"),  # progress.json is still the one of prepare
        (TRAIN, "Training", "Training"),
        (TRAIN, "Evaluating", "Evaluating"),
        (TRAIN, "Publishing", "Publishing"),
        (TRAIN, "Succeeded", "Publishing"),  # the pod deletes its checkpoints
        (pod(prepare=DONE, train=DONE), "Succeeded", "Publishing"),
    ],
)
def test_the_stage_of_a_job_never_goes_back(found: dict[str, Any], reported: str, shown: str) -> None:
    status, _ = observe(
        World(
            FineTuneJob.model_validate(JOB),
            [{"spec": {}, "status": {}, "metadata": {"name": "support"}}],
            [found],
            progress(reported),
        )
    )
    assert status.stage == shown


CHILD = {"metadata": {"name": "support"}, "spec": {}, "status": {}}
HELD = {**CHILD, "spec": {"suspend": True}}
COMPLETE = {**CHILD, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
PENDING = {"metadata": {"name": "support-1"}, "status": {"phase": "Pending"}}


@pytest.mark.parametrize(
    ("child", "found", "expected"),
    [
        (CHILD, [], True),  # only an Event has the reason why there is no pod
        (HELD, [], False),
        (CHILD, [PENDING], False),
        (CHILD, [pod(prepare=RUNNING)], True),
        (CHILD, [TRAIN], True),
        (CHILD, [pod(prepare=DONE, train=DONE)], False),
        (COMPLETE, [], False),
    ],
)
def test_a_job_is_polled_only_while_something_has_no_event(
    child: dict[str, Any], found: list[dict[str, Any]], expected: bool
) -> None:
    assert polled(World(FineTuneJob.model_validate(JOB), children=[child], pods=found)) is expected
