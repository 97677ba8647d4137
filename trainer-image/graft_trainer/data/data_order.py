"""Choose the examples of each step (PURE): a function of the seed, the epoch and the step.

The order of an epoch is the order that transformers' Trainer and accelerate draw (SeedableRandomSampler), so a run
trains on the same examples as a plain script. A step takes the next examples of this order. Their number does not
depend on how many ranks and micro-batches share them. So the point at which a run resumes is a number of steps. This
number stays valid if the micro-batch is halved, and if the last step of an epoch has fewer examples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from graft_trainer.data.tokens import IGNORED


class DataOrder(Sampler[list[int]]):  # type: ignore[misc]
    """The batch sampler of one rank: `accumulation` micro-batches of up to `batch` indices per step, fewer in the last
    step of an epoch. All ranks get the same number of micro-batches. A rank for which no examples are left gets empty
    ones."""

    def __init__(self, examples: int, batch: int, accumulation: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.examples = examples
        self.batch = batch
        self.effective = batch * accumulation * world
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches of an epoch."""
        steps, rest = divmod(self.examples, self.effective)
        return steps * (self.effective // (self.batch * self.world)) + self._rounds(rest)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.examples, generator=generator).tolist()
        for begin in range(0, self.examples, self.effective):
            step = order[begin : begin + self.effective]
            for number in range(self._rounds(len(step))):
                first = (number * self.world + self.rank) * self.batch
                yield step[first : first + self.batch]

    def _rounds(self, examples: int) -> int:
        return -(-examples // (self.batch * self.world))


class EpochLoader(DataLoader[Any]):  # type: ignore[misc]
    """A DataLoader whose order depends on the epoch. accelerate's own loader is not used: it reads one batch ahead,
    distributes the batches over the ranks in its own way, and repeats examples if their number is not divisible."""

    def __init__(
        self, examples: Sequence[Any], order: DataOrder, collate: Callable[[list[Any]], Any], pin: bool
    ) -> None:
        # An empty micro-batch has no example that gives it a shape. It gets one example, which the loss does not cover.
        super().__init__(
            examples,
            batch_sampler=order,
            collate_fn=lambda chosen: collate(chosen) if chosen else blank(examples, collate),
            pin_memory=pin,
        )
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def blank(examples: Sequence[Any], collate: Any) -> dict[str, torch.Tensor]:
    """Return a batch that the loss does not cover, for a rank that has no examples while other ranks have some."""
    tokens = collate.tokens
    batch: dict[str, torch.Tensor] = collate([examples[0]])
    collate.tokens = tokens
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    return batch
