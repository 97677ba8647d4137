"""Work on a model in batches that fit in memory."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from graft_trainer.run.failures import out_of_memory

log = logging.getLogger(__name__)


class Steps(Protocol):
    """A callback that runs after every batch."""

    def step(self, count: int) -> None:
        """Record that `count` more examples are done."""


def in_batches(
    order: Sequence[int], size: int, work: Callable[[Sequence[int]], None], meter: Steps | None = None
) -> None:
    """Call `work` with batches of at most `size` indices, in order. If memory runs out, continue with half the size."""
    done = 0
    while done < len(order):
        chosen = order[done : done + size]
        try:
            work(chosen)
        except Exception as error:
            if not out_of_memory(error) or len(chosen) == 1:
                raise
            size = len(chosen) // 2
        else:
            done += len(chosen)
            if meter is not None:
                meter.step(len(chosen))
            continue
        # Not in the except block: there, the exception's frames still hold the tensors that did not fit.
        log.warning("memory ran out, continuing with %d examples at once", size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
