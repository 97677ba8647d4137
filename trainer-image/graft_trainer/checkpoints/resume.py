"""Which checkpoint an attempt resumes from: the newest one that all of its ranks can read."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graft.contracts.progress import CheckpointRef

from graft_trainer.checkpoints.checkpoint import Checkpoint, Receipt
from graft_trainer.checkpoints.state import loader
from graft_trainer.checkpoints.store import CheckpointStore, read_state
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Device, Resolved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """A checkpoint that was read into memory."""

    step: int
    final: bool  # taken after the last step: it holds the weights and the curves, but no optimizer state
    state: dict[str, Any]


def find_resume(
    checkpoints: CheckpointStore, resolved: Resolved, device: Device, report: Callable[[list[CheckpointRef]], None]
) -> Resume | None:
    """Return the newest checkpoint that is complete, belongs to this recipe and matches its receipts.

    Return None if there is none.
    """
    usable: list[Checkpoint] = []
    if distributed.is_main():
        usable = checkpoints.usable(resolved.world_size)
        report([checkpoint.ref() for checkpoint in reversed(usable)])
    for checkpoint in _from_main(usable):
        if checkpoint.final and distributed.joined():
            continue  # only rank 0 uses a final checkpoint, and these ranks have already connected
        state = _read(checkpoints, checkpoint, device)
        if distributed.total([state is None]) == [0] and state is not None:
            log.info("resuming from the checkpoint of step %d, %s", checkpoint.step, checkpoint.prefix)
            return Resume(checkpoint.step, checkpoint.final, state)
    return None


def _read(checkpoints: CheckpointStore, checkpoint: Checkpoint, device: Device) -> dict[str, Any] | None:
    """Return this rank's state, or None if a file does not match its receipt."""
    rank = 0 if checkpoint.final else distributed.rank()
    target = torch.device(device.kind)
    parts = []
    for part in [rank, 0]:
        if (path := checkpoints.fetch(checkpoint, part)) is None:
            return None
        state: dict[str, Any] = read_state(path, lambda get: loader(get, target))
        path.unlink()
        parts.append(state)
        if state["weights"] is not None:
            break
    # Without sharding, only rank 0's part has the weights and the optimizer state.
    return parts[0] | {key: parts[-1].get(key) for key in ("weights", "optimizer")}


def _from_main(usable: list[Checkpoint]) -> list[Checkpoint]:
    told = [[one.attempt, one.step, one.final, [receipt.model_dump() for receipt in one.receipts]] for one in usable]
    return [
        Checkpoint(attempt, step, final, tuple(Receipt.model_validate(receipt) for receipt in receipts))
        for attempt, step, final, receipts in distributed.from_main(told)
    ]
