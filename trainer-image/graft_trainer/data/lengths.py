"""Measure the lengths of the examples in tokens, and what training.maxLength cuts off, before a GPU is used.

It tokenises the examples with the code that train uses. So the numbers are those of the training, and an example that
cannot be used is found before a GPU is used.
"""

import math
import random
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.contracts.progress import DatasetStatistics

from graft_trainer.data.example import Example
from graft_trainer.data.pod_tokens import all_threads
from graft_trainer.data.tokens import Sized, Task, usable
from graft_trainer.data.unusable import Unusable

HIGH_SHARE = 0.1  # if a larger share of the examples is cut, the user gets a warning
WHOLE_SHARE = 0.99  # share of the examples that stay whole with the length that the warning proposes


@dataclass
class Lengths:
    """The lengths of the measured examples, in tokens. A conversation can become several sequences. The lists have one
    entry per sequence."""

    whole: Sequence[int]  # before truncation; for seq2seq, both sides together
    sides: Sequence[int]  # the length that maxLength limits: for seq2seq the longer side, else the whole
    tokens: int  # total after truncation
    truncated: int  # sequences
    examples: int  # measured

    @property
    def truncated_share(self) -> float:
        return self.truncated / len(self.sides)

    def add(self, found: Sequence[Sized], max_length: int) -> None:
        """Add the sequences of one example."""
        self.examples += 1
        for one in found:
            self.whole.append(one.whole)  # type: ignore[attr-defined]
            self.sides.append(one.longest)  # type: ignore[attr-defined]
            self.truncated += one.longest > max_length
            self.tokens += one.item.tokens


def measure(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    role: str,
    task: Task = "causal",
    skip: bool = False,
    most: int | None = None,
) -> tuple[Lengths, Unusable]:
    """Measure all `examples`. With `most`, measure a random sample with about as many characters.

    Raises Failure(DatasetInvalid) if an example cannot be used; with `skip`, only if no example remains.
    """
    lengths, unusable = Lengths(array("i"), array("i"), 0, 0, 0), Unusable(role, max_length)
    chosen = examples if most is None else _sample(examples, most)
    with all_threads():
        for _, found in usable(chosen, tokenizer, max_length, task, unusable):
            lengths.add(found, max_length)
    unusable.check(len(chosen), skip=skip)
    return lengths, unusable


def _sample(examples: Sequence[Example], most: int) -> list[Example]:
    order = random.Random(0).sample(range(len(examples)), len(examples))  # noqa: S311 - a reproducible draw
    chosen, characters = [], 0
    for index in order:
        if characters > most:
            break
        chosen.append(examples[index])
        characters += _characters(chosen[-1])
    return chosen


def describe(lengths: Lengths, *, examples: int, held_out: int, invalid: int) -> DatasetStatistics:
    """Return the statistics of a dataset with `examples` examples. `lengths` holds all of them or a sample."""
    ordered, scale = sorted(lengths.whole), examples / lengths.examples
    return DatasetStatistics(
        examples=examples,
        held_out=held_out,
        invalid=invalid,
        tokens=round(lengths.tokens * scale),
        mean_tokens=round(statistics.fmean(ordered), 1),
        median_tokens=quantile(ordered, 0.5),
        p95_tokens=quantile(ordered, 0.95),
        max_tokens=ordered[-1],
        truncated_share=round(lengths.truncated_share, 4),
        sampled=lengths.examples < examples,
    )


def advice(lengths: Lengths, max_length: int, room: int | None) -> str | None:
    """Return advice if many examples are cut, else None. `room` is the largest possible maxLength, None if there is no
    limit."""
    if lengths.truncated_share <= HIGH_SHARE:
        return None
    ordered = sorted(lengths.sides)
    enough = -(-quantile(ordered, WHOLE_SHARE) // 64) * 64
    wanted = enough if room is None else min(enough, room)
    share, longest = f"{100 * lengths.truncated_share:.0f} %", ordered[-1]
    cut = f"{share} of the examples are cut to {max_length} tokens; the longest has {longest} tokens"
    if wanted <= max_length:
        return f"{cut}. Split these examples: the base model reads at most {room} tokens"
    left = sum(length <= wanted for length in ordered) / len(ordered)
    return f"{cut}. Raise spec.training.maxLength to {wanted}: then {100 * left:.0f} % of the examples stay whole"


def quantile(ordered: Sequence[int], share: float) -> int:
    """Return the smallest of the ascending numbers that at least `share` of the numbers do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _characters(example: Example) -> int:
    if example.messages is not None:
        return sum(len(str(message.get("content") or "")) for message in example.messages)
    return len(example.text or "") + len(example.prompt or "") + len(example.answer or "")
