"""Measure the lengths of the examples in tokens, and what training.maxLength cuts off, before a GPU is used.

It tokenises the examples one by one with the code that train uses, so the numbers are those of the training. Of a large
dataset it measures a sample, which bounds the time.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.contracts.progress import DatasetStatistics, Reason

from graft_trainer.data.example import Example
from graft_trainer.data.tokens import Task, tokenise_one, tokenise_pair
from graft_trainer.run.failures import Failure

CHARACTERS = 50_000_000  # characters that are tokenised at most; takes half a minute on one core
HIGH_SHARE = 0.1  # if a larger share of the examples is cut, the user gets a warning
WHOLE_SHARE = 0.99  # share of the examples that stay whole with the length that the warning proposes


@dataclass(frozen=True)
class Lengths:
    """The lengths of the measured examples, in tokens. The lists have one entry per example."""

    whole: list[int]  # before truncation; for seq2seq, both sides together
    sides: list[int]  # the length that maxLength limits: for seq2seq the longer side, else the whole
    tokens: int  # total after truncation, without the examples that are dropped
    truncated: int  # examples

    @property
    def truncated_share(self) -> float:
        return self.truncated / len(self.sides)


def measure(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, role: str, task: Task = "causal"
) -> Lengths:
    """Measure a sample of `examples`, or all if they are few. Raises Failure(DatasetInvalid) if no example has a token
    within `max_length` that the loss covers, or if the chat template refuses an example."""
    whole, sides = [], []
    tokens = truncated = characters = 0
    order = random.Random(0).sample(range(len(examples)), len(examples))  # noqa: S311 - a reproducible draw
    for index in order:
        if characters > CHARACTERS:
            break
        example = examples[index]
        characters += _characters(example)
        if task == "seq2seq":
            source, target = tokenise_pair(example, tokenizer)
            parts, learned = [len(source), len(target)], bool(target[:max_length])
        else:
            ids, learns = tokenise_one(example, tokenizer)
            parts, learned = [len(ids)], any(learns[1:max_length])
        whole.append(sum(parts))
        sides.append(max(parts))
        truncated += max(parts) > max_length
        tokens += sum(min(part, max_length) for part in parts) if learned else 0
    if not tokens:
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.{role}: none of the {len(whole)} examples has a token to train on within {max_length} tokens",
            "Raise spec.training.maxLength, or shorten the prompts.",
        )
    return Lengths(whole, sides, tokens, truncated)


def describe(lengths: Lengths, *, examples: int, held_out: int, invalid: int) -> DatasetStatistics:
    """Return the statistics of a dataset with `examples` examples. `lengths` holds all of them or a sample."""
    ordered, scale = sorted(lengths.whole), examples / len(lengths.whole)
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
        sampled=len(lengths.whole) < examples,
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
