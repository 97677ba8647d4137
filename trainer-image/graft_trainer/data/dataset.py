"""Read the lines of a dataset (PURE): check each line against its format, and report the invalid lines.

prepare and train read the files with this same code, so train uses exactly the lines that prepare accepted.
"""

import hashlib
import json
import random
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, overload

from graft.api.recipe import Columns, Dataset
from graft.contracts.progress import Reason

from graft_trainer.data.lines import LINE, BadLine, bounded_lines, excerpt, kind_of, record_of
from graft_trainer.run.failures import Failure

ROLES = ("system", "user", "assistant", "tool")
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
SHOWN = 5  # invalid lines that a message shows; the message counts all of them
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One line: a conversation, a prompt with its answer, or a text. Exactly one of the three is set."""

    line: int
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    answer: str | None = None  # the expected answer; of a conversation, the last message
    text: str | None = None
    asked: tuple[str, str] | None = None  # (instruction, input) that filled the template of the prompt


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
    good = bad = 0
    for number, (begin, raw) in enumerate(bounded_lines(stream), start=1):
        if not _content(number, raw).strip():
            continue
        if limit is not None and good + (0 if skip else bad) >= limit:
            break
        try:
            parse(number, raw)
        except BadLine as error:
            bad += 1
            if len(problems) < SHOWN:
                problems.append(f"line {number}: {error} — {excerpt(_content(number, raw))}")
            continue
        good += 1
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
    return Reading(Examples(stream, parse, numbers, begins), good, bad, problems)


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


def fill(template: str, instruction: str, further: str) -> str:
    """Return the template with its placeholders filled. Other braces stay as they are."""
    values = {"instruction": instruction, "input": further}
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def _content(number: int, raw: bytes) -> bytes:
    """Return the line without the byte order mark that some editors put at the beginning of a file."""
    return raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def parser_of(spec: Dataset) -> Callable[[int, dict[str, Any]], Example]:
    columns = spec.columns or Columns()
    if spec.format == "chat":
        return lambda line, record: _chat(line, record, columns.messages or "messages")
    if spec.format == "instruction":
        return lambda line, record: _instruction(line, record, columns, spec.templates[0] if spec.templates else None)
    return lambda line, record: Example(line, text=_string(record, columns.text or "text"))


def _chat(line: int, record: dict[str, Any], column: str) -> Example:
    messages = _field(record, column)
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"{column} must be a list of messages that is not empty")
    for index, message in enumerate(messages):
        where = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise BadLine(f"{where} is a {kind_of(message)}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            shown = excerpt(json.dumps(role, ensure_ascii=False).encode())
            raise BadLine(f"{where}.role is {shown}, not one of {', '.join(ROLES)}")
        if role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
            continue
        if not isinstance(content, str) or not content.strip():
            problem = "is empty" if isinstance(content, str) else f"is a {kind_of(content)}, not a text"
            raise BadLine(f"{where}.content {problem if 'content' in message else 'is missing'}")
    last = messages[-1]
    if last["role"] != "assistant":
        raise BadLine(f"the last message is from {last['role']}, not from assistant: there is no answer to train on")
    if all(message["role"] in {"assistant", "system"} for message in messages):
        raise BadLine("there is no user message before the answer")
    return Example(line, messages=tuple(messages), answer=last.get("content") or "")


def _instruction(line: int, record: dict[str, Any], columns: Columns, template: str | None) -> Example:
    instruction = _string(record, columns.instruction or "instruction")
    answer = _string(record, columns.output or "output")
    name = columns.input or "input"
    further = record.get(name)
    if further is None:
        further = ""
    if not isinstance(further, str):
        raise BadLine(f"{name} is a {kind_of(further)}, not a text")
    if template is not None:
        return Example(line, prompt=fill(template, instruction, further), answer=answer, asked=(instruction, further))
    question = f"{instruction}\n\n{further}" if further.strip() else instruction
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(line, messages=messages, answer=answer)


def _field(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        found = ", ".join(sorted(record)[:8]) or "none"
        raise BadLine(f"there is no field {name} (fields: {found})")
    return record[name]


def _string(record: dict[str, Any], name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise BadLine(f"{name} is a {kind_of(value)}, not a text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    return value


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
