"""How long the examples are in tokens, and what training.maxLength cuts off: told before a GPU is taken.

It tokenises one by one with the very code that train uses, so what is told is what will be learned; of a large dataset it
measures a sample, which bounds the time.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.contracts.progress import DatasetStatistics, Reason

from graft_trainer.data.dataset import Example
from graft_trainer.data.tokens import Task, tokenise_one, tokenise_pair
from graft_trainer.run.failures import Failure

CHARACTERS = 50_000_000  # that are tokenised at most: half a minute of one core
HIGH_SHARE = 0.1  # of examples that are cut; above it a warning
WHOLE_SHARE = 0.99  # of examples that the length in the warning leaves whole


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples that were measured, a list entry each."""

    whole: list[int]  # before truncation, of seq2seq both sides together
    sides: list[int]  # what is held against maxLength: of seq2seq the longer side, else the whole
    tokens: int  # in all, after truncation
    truncated: int

    @property
    def truncated_share(self) -> float:
        return self.truncated / len(self.sides)


def measure(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, role: str, task: Task = "causal"
) -> Lengths:
    """The lengths of a sample of `examples`, of all where they are few. Failure(DatasetInvalid) when nothing to learn is
    left of any of them within `max_length`, or the chat template refuses one."""
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
            f"dataset.{role}: none of the {len(whole)} examples has anything to learn within {max_length} tokens",
            "Raise training.maxLength, or shorten the prompts.",
        )
    return Lengths(whole, sides, tokens, truncated)


def describe(lengths: Lengths, *, examples: int, held_out: int, invalid: int) -> DatasetStatistics:
    """The statistics of a dataset with so many examples, of which `lengths` has all or a sample."""
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
    """What to do about many examples that are cut; `room` is the longest that maxLength can be, None for no such bound."""
    if lengths.truncated_share <= HIGH_SHARE:
        return None
    ordered = sorted(lengths.sides)
    enough = -(-quantile(ordered, WHOLE_SHARE) // 64) * 64
    wanted = enough if room is None else min(enough, room)
    cut = f"{100 * lengths.truncated_share:.0f} % of the examples are cut to {max_length} tokens, the longest has {ordered[-1]}"
    if wanted <= max_length:
        return f"{cut}: split them, the base model reads no more than {room}"
    left = sum(length <= wanted for length in ordered) / len(ordered)
    return f"{cut}: raise training.maxLength to {wanted}, which leaves {100 * left:.0f} % whole"


def quantile(ordered: Sequence[int], share: float) -> int:
    """The least of the ascending numbers that so great a share of them does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _characters(example: Example) -> int:
    if example.messages is not None:
        return sum(len(str(message.get("content") or "")) for message in example.messages)
    return len(example.text or "") + len(example.prompt or "") + len(example.answer or "")
