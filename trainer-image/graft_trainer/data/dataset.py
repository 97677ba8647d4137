"""Read the lines of a dataset (PURE): check each line against its format, and report the invalid lines.

prepare and train read the files with this same code, so train uses exactly the lines that prepare accepted.
"""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, overload

from graft.api.recipe import Dataset
from graft.contracts.progress import Reason
from graft.prompttemplates import PLACEHOLDER, fill

from graft_trainer.data.example import Example
from graft_trainer.data.formats import parser_of
from graft_trainer.data.lines import LINE, BadLine, bounded_lines, excerpt, record_of
from graft_trainer.run.failures import Failure

SHOWN = 5  # invalid lines that a message shows; the message counts all of them
UNREAD_FIELDS = 64  # names of fields that are counted; a line of a stranger can have any number of them


class Examples(Sequence[Example]):
    """The examples of a file. Every access reads the example from the file again. Memory holds only the positions of
    the lines: the texts of a large file, as Python objects, need more memory than a pod has."""

    def __init__(
        self, stream: BinaryIO, parse: Callable[[int, bytes], Example], numbers: Iterable[int], begins: Iterable[int]
    ) -> None:
        """`numbers` are the line numbers. `begins` are the offsets in bytes at which these lines begin."""
        self.stream = stream
        self.parse = parse
        self.numbers = array("q", numbers)
        self.begins = array("q", begins)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.choose(range(*index.indices(len(self))))
        self.stream.seek(self.begins[index])
        return self.parse(self.numbers[index], self.stream.readline(LINE.size + 1))

    def choose(self, indices: Sequence[int]) -> "Examples":
        """Return the examples at these indices, in this order."""
        numbers, begins = (self.numbers[index] for index in indices), (self.begins[index] for index in indices)
        return Examples(self.stream, self.parse, numbers, begins)

    def map(self, change: Callable[[Example], Example]) -> "Examples":
        """Return all examples. `change` is applied to an example when it is read."""
        parse = self.parse
        return Examples(self.stream, lambda number, raw: change(parse(number, raw)), self.numbers, self.begins)


@dataclass(frozen=True)
class Reading:
    """The examples of a file, in the file's order, and the lines that were skipped."""

    examples: Examples
    total: int  # examples in the file; more than len(examples) if only a sample was kept
    invalid: int = 0  # lines that were skipped, with dataset.onInvalid: skip
    problems: list[str] = field(default_factory=list)  # what is wrong with the first skipped lines
    unread: dict[str, int] = field(default_factory=dict)  # field that only a chat template may read -> lines

    @property
    def reasons(self) -> dict[str, int]:
        """BadLine.trouble -> lines that were skipped."""
        return {"format": self.invalid} if self.invalid else {}


def check_template(template: str) -> None:
    """Check an instruction template. Raises Failure(DatasetInvalid) if it cannot be filled."""
    names = set(PLACEHOLDER.findall(template))
    if unknown := sorted(names - {"instruction", "input"}):
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.templates has unknown placeholders: {', '.join(f'{{{name}}}' for name in unknown)}",
            "Use only {instruction} and {input} in spec.dataset.templates.",
        )
    if "instruction" not in names:
        raise Failure(
            Reason.DATASET_INVALID,
            "a template in spec.dataset.templates has no {instruction}, so every prompt would be the same",
            "Put {instruction} into every template in spec.dataset.templates, and also {input} if the examples have further input.",
        )


def read_examples(
    stream: BinaryIO, spec: Dataset, *, role: str, uri: str, limit: int | None, most: int | None = None
) -> Reading:
    """Read the examples of a JSONL file, at most the first `limit`. The stream must stay open: examples are read from
    it later.

    Raises Failure(DatasetInvalid) if a line is invalid; with dataset.onInvalid: skip, only if no line is valid. The
    message shows the first invalid lines and counts all of them. `role` is train or eval, for the messages. Empty lines
    are ignored. If the file has more than `most` examples, `most` of them are kept, each with the same probability
    (Vitter 1985, algorithm R). This bounds the memory.
    """
    of_record, skip, draw = parser_of(spec), spec.on_invalid == "skip", random.Random(0)  # noqa: S311 - a reproducible draw

    def parse(number: int, raw: bytes) -> Example:
        return of_record(number, record_of(_content(number, raw)))

    numbers, begins = array("q"), array("q")
    problems: list[str] = []
    unread: Counter[str] = Counter()
    good = bad = 0
    for number, (begin, raw) in enumerate(bounded_lines(stream), start=1):
        if not _content(number, raw).strip():
            continue
        if limit is not None and good + (0 if skip else bad) >= limit:
            break
        try:
            example = parse(number, raw)
        except BadLine as error:
            bad += 1
            if len(problems) < SHOWN:
                problems.append(f"line {number}: {error} — {excerpt(_content(number, raw))}")
            continue
        good += 1
        unread.update(name for name in example.unread if name in unread or len(unread) < UNREAD_FIELDS)
        if most is None or len(numbers) < most:
            numbers.append(number)
            begins.append(begin)
        elif (place := draw.randrange(good)) < most:
            numbers[place], begins[place] = number, begin
    if bad and not (skip and good):
        more = f"; and {bad - len(problems)} more" if bad > len(problems) else ""
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.{role} ({uri}): {bad} of {good + bad} lines {'is' if bad == 1 else 'are'} invalid: "
            f"{'; '.join(problems)}{more}",
            _remedy(spec),
        )
    if not good:
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.{role} ({uri}) has no examples: the file is empty",
            "Put one JSON object per line into the file, or correct the URI.",
        )
    if good > len(numbers):
        numbers, begins = (array("q", sorted(places)) for places in (numbers, begins))
    return Reading(Examples(stream, parse, numbers, begins), good, bad, problems, dict(unread.most_common()))


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Return (train, held out). `share` of the examples, at least one, are held out. They are drawn with `seed`. Both
    parts keep the file's order."""
    if len(examples) < 2:
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.evalSplit needs at least 2 examples, but spec.dataset.train has {len(examples)}",
            "Add examples, or remove spec.dataset.evalSplit.",
        )
    size = held_out_size(len(examples), share)
    held = set(random.Random(seed).sample(range(len(examples)), size))  # noqa: S311 - a reproducible draw
    learned = [index for index in range(len(examples)) if index not in held]
    return examples.choose(learned), examples.choose(sorted(held))


def vary(examples: Examples, templates: Sequence[str] | None, seed: int) -> Examples:
    """Give each training example one of several templates, drawn with `seed` and the number of its line. So the choice
    depends neither on the other lines nor on the rank that reads them. Before this call all examples have the first
    template, and held-out examples keep it."""
    if templates is None or len(templates) == 1:
        return examples

    def drawn(example: Example) -> Example:
        if example.asked is None:
            return example
        number = hashlib.blake2b(f"{seed}:{example.line}".encode(), digest_size=8).digest()
        return replace(example, prompt=fill(templates[int.from_bytes(number) % len(templates)], *example.asked))

    return examples.map(drawn)


def held_out_size(examples: int, share: float) -> int:
    """Return how many of the examples are held out: at least one, and not all."""
    return min(examples - 1, max(1, round(examples * share)))


def _content(number: int, raw: bytes) -> bytes:
    """Return the line without the byte order mark that some editors put at the beginning of a file."""
    return raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def _remedy(spec: Dataset) -> str:
    if spec.format == "chat":
        shape = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    elif spec.format == "instruction":
        shape = '{"instruction": "…", "input": "…", "output": "…"}'
    else:
        shape = '{"text": "…"}'
    skip = (
        " Or set spec.dataset.onInvalid to skip: then invalid lines are skipped." if spec.on_invalid == "fail" else ""
    )
    return (
        f"Correct these lines so that each is one object of the form {shape}, or set spec.dataset.format and "
        f"spec.dataset.columns to match the file.{skip}"
    )
