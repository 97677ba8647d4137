"""Work on a model in batches that fit in memory."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from graft_trainer.run.failures import out_of_memory

log = logging.getLogger(__name__)


class Steps(Protocol):
    """Is called after every batch."""

    def step(self, count: int) -> None:
        """`count` examples are done."""


def in_batches(
    order: Sequence[int], size: int, work: Callable[[Sequence[int]], None], meter: Steps | None = None
) -> None:
    """Call `work` with at most `size` of the indices after each other; half as many from where memory runs out."""
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
        # Here and not above: the exception's frames hold the tensors that did not fit.
        log.warning("memory ran out, continuing with %d examples at once", size)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
