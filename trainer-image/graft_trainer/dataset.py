"""The dataset's lines (PURE): what a line of each format must look like, and every line that does not.

Both prepare and train read the files with this code, so what prepare let through is what is learned.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graft.api.recipe import Columns, Dataset
from graft.contracts import Reason

from graft_trainer.failures import Failure

ROLES = ("system", "user", "assistant", "tool")
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
SHOWN = 5  # bad lines that a message shows; all are counted
EXCERPT = 100  # characters of a bad line that are shown
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One line: a conversation, a prompt with its answer, or a text. Exactly one of the three is there."""

    line: int
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    answer: str | None = None  # what the model should say; for a conversation its last message
    text: str | None = None
    asked: tuple[str, str] | None = None  # instruction and further input, which a template's prompt was made of


@dataclass(frozen=True)
class Reading:
    """A file's examples in its order, and what was left out of it."""

    examples: list[Example]
    total: int  # examples in the file; more than are here when only a sample was kept
    invalid: int = 0  # lines left out, with dataset.onInvalid: skip
    problems: list[str] = field(default_factory=list)  # what is wrong with the first of them


class BadLine(Exception):
    """What is wrong with a line."""


def check_template(template: str) -> None:
    """Failure when an instruction template cannot be filled."""
    names = set(PLACEHOLDER.findall(template))
    if unknown := sorted(names - {"instruction", "input"}):
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.templates has unknown placeholders: {', '.join(f'{{{name}}}' for name in unknown)}",
            "Use only {instruction} and {input} in dataset.templates.",
        )
    if "instruction" not in names:
        raise Failure(
            Reason.DATASET_INVALID,
            "dataset.templates has no {instruction}: every prompt would be the same",
            "Put {instruction}, and {input} where there is further input, into dataset.templates.",
        )


def read_examples(
    lines: Iterable[bytes], spec: Dataset, *, role: str, uri: str, limit: int | None, most: int | None = None
) -> Reading:
    """The examples of a JSONL file, the first `limit` of them. Failure names the bad lines and counts them; with
    dataset.onInvalid: skip only where no line is good.

    `role` is train or eval, for the messages. Empty lines are passed over. Of a file with more than `most` examples so many
    are kept, each with the same probability (Vitter 1985, algorithm R), so that the memory is bounded.
    """
    parse, skip, draw = parser_of(spec), spec.on_invalid == "skip", random.Random(0)  # noqa: S311 - a reproducible draw
    kept: list[Example] = []
    problems: list[str] = []
    good = bad = 0
    for number, raw in enumerate(lines, start=1):
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not content.strip():
            continue
        if limit is not None and good + (0 if skip else bad) >= limit:
            break
        try:
            example = parse(number, record_of(content))
        except BadLine as error:
            bad += 1
            if len(problems) < SHOWN:
                problems.append(f"line {number}: {error} — {excerpt(content)}")
            continue
        good += 1
        if most is None or len(kept) < most:
            kept.append(example)
        elif (place := draw.randrange(good)) < most:
            kept[place] = example
    if bad and not (skip and good):
        more = f"; and {bad - len(problems)} more" if bad > len(problems) else ""
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.{role} ({uri}): {bad} of {good + bad} lines {'is' if bad == 1 else 'are'} invalid: "
            f"{'; '.join(problems)}{more}",
            _remedy(spec),
        )
    if not good:
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.{role} ({uri}) has no examples: the file is empty",
            "Put one JSON object per line into the file, or correct the URI.",
        )
    if good > len(kept):
        kept.sort(key=lambda example: example.line)
    return Reading(kept, good, bad, problems)


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): `share` of the examples, at least one, drawn with `seed`; both keep the file's order."""
    if len(examples) < 2:
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.evalSplit needs at least 2 examples, dataset.train has {len(examples)}",
            "Add examples, or remove dataset.evalSplit.",
        )
    size = held_out_size(len(examples), share)
    held = set(random.Random(seed).sample(range(len(examples)), size))  # noqa: S311 - a reproducible draw
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [example for index, example in enumerate(examples) if index in held],
    )


def vary(examples: Sequence[Example], templates: Sequence[str] | None, seed: int) -> list[Example]:
    """Training examples with one of several templates each, drawn with `seed` and the line's number: the same whichever
    other lines are there and whichever process reads them. Until then all have the first, which held-out examples keep."""
    if templates is None or len(templates) == 1:
        return list(examples)

    def drawn(example: Example) -> Example:
        if example.asked is None:
            return example
        number = hashlib.blake2b(f"{seed}:{example.line}".encode(), digest_size=8).digest()
        return replace(example, prompt=fill(templates[int.from_bytes(number) % len(templates)], *example.asked))

    return [drawn(example) for example in examples]


def held_out_size(examples: int, share: float) -> int:
    """How many of so many examples are held out: at least one, and not all."""
    return min(examples - 1, max(1, round(examples * share)))


def fill(template: str, instruction: str, further: str) -> str:
    """The prompt: placeholders filled, other braces left as they are."""
    values = {"instruction": instruction, "input": further}
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def parser_of(spec: Dataset) -> Callable[[int, dict[str, Any]], Example]:
    columns = spec.columns or Columns()
    if spec.format == "chat":
        return lambda line, record: _chat(line, record, columns.messages or "messages")
    if spec.format == "instruction":
        return lambda line, record: _instruction(line, record, columns, spec.templates[0] if spec.templates else None)
    return lambda line, record: Example(line, text=_string(record, columns.text or "text"))


def record_of(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise BadLine("nested too deeply") from error
    if not isinstance(record, dict):
        raise BadLine(f"a JSON {_kind(record)}, not an object")
    if "\\u" in text:  # an escape can stand for half a character, which no tokenizer takes
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadLine("an unpaired surrogate escape (\\ud800 to \\udfff)") from error
    return record


def _chat(line: int, record: dict[str, Any], column: str) -> Example:
    messages = _field(record, column)
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"{column} must be a list of messages that is not empty")
    for index, message in enumerate(messages):
        where = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise BadLine(f"{where} is a {_kind(message)}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadLine(f"{where}.role is {json.dumps(role, ensure_ascii=False)}, not one of {', '.join(ROLES)}")
        if role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
            continue
        if not isinstance(content, str) or not content.strip():
            problem = "is empty" if isinstance(content, str) else f"is a {_kind(content)}, not a text"
            raise BadLine(f"{where}.content {problem if 'content' in message else 'is missing'}")
    last = messages[-1]
    if last["role"] != "assistant":
        raise BadLine(f"the last message is from {last['role']}, not from assistant: there is no answer to learn")
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
        raise BadLine(f"{name} is a {_kind(further)}, not a text")
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
        raise BadLine(f"{name} is a {_kind(value)}, not a text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def excerpt(raw: bytes) -> str:
    text = raw.decode(errors="replace").strip()
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def _remedy(spec: Dataset) -> str:
    if spec.format == "chat":
        shape = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    elif spec.format == "instruction":
        shape = '{"instruction": "…", "input": "…", "output": "…"}'
    else:
        shape = '{"text": "…"}'
    leave = ", or set dataset.onInvalid to skip, which leaves bad lines out" if spec.on_invalid == "fail" else ""
    return f"Correct these lines to one {shape} each, or set dataset.format and dataset.columns to what the file has{leave}."
