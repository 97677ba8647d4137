"""The examples of the files that prepare downloaded: read, split into training and held-out ones, varied by templates."""

import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from graft.api.recipe import Dataset, DatasetSource

from graft_trainer.data.dataset import Examples, Reading, held_out_size, read_examples, split, vary
from graft_trainer.data.example import Example

log = logging.getLogger(__name__)


def without(examples: Sequence[Example], lines: Set[int]) -> Sequence[Example]:
    """Return the examples that are not at one of these lines of the file."""
    if not lines or not isinstance(examples, Examples):
        return examples
    return examples.choose([index for index, line in enumerate(examples.numbers) if line not in lines])


@dataclass(frozen=True)
class Data:
    """The examples to train on and to measure with."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    examples: int  # to train on, in all; more than in `train` if that is a sample
    held_out_examples: int  # in all; more than in `held_out` if that is a sample
    reasons: dict[str, int]  # BadLine.trouble -> lines that are in neither
    sampled: bool = False  # whether `train` or `held_out` is a sample
    unread: dict[str, int] = field(default_factory=dict)  # field that only a chat template may read -> lines


def read_data(dataset: Dataset, folder: Path, seed: int, most: int | None = None) -> Data:
    """Read train.jsonl and eval.jsonl of `folder`.

    With `most`: if a file has more examples, keep a sample of `most`.
    """

    def read(role: str, source: DatasetSource) -> Reading:
        stream = (folder / f"{role}.jsonl").open("rb")  # it stays open: the examples are read from it later
        found = read_examples(stream, dataset, role=role, uri=source.uri, limit=source.limit, most=most)
        if found.invalid:
            share, shown = found.invalid / (found.invalid + found.total), "; ".join(found.problems)
            log.warning(
                "dataset.%s: %d invalid lines are left out (%.1f %%): %s", role, found.invalid, 100 * share, shown
            )
        return found

    train = read("train", dataset.train)
    learned, reasons, unread = train.examples, Counter(train.reasons), Counter(train.unread)
    held: Sequence[Example] = []
    held_total = 0
    if dataset.eval is not None:
        found = read("eval", dataset.eval)
        held, held_total, reasons = found.examples, found.total, reasons + Counter(found.reasons)
        unread += Counter(found.unread)
    elif dataset.eval_split is not None:
        learned, held = split(learned, dataset.eval_split, seed)
        held_total = held_out_size(train.total, dataset.eval_split)
    total = train.total if dataset.eval is not None else train.total - held_total
    sampled = len(learned) < total or len(held) < held_total
    varied = vary(learned, dataset.templates, seed)
    return Data(varied, held, total, held_total, dict(reasons), sampled, dict(unread.most_common()))
