"""Calls of tools in a model's answer (PURE): the formats of today's chat templates, under the names of vLLM's parsers.

The engine for CPUs turns answers into `tool_calls` with it, and the evaluation compares calls with it. It knows the text
of an answer only: no tokens, no templates and no tools. vLLM has more parsers; PARSERS are those that exist here.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn


class Call(NamedTuple):
    """One call. Two calls are equal if their names and arguments are equal as JSON values."""

    name: str
    arguments: dict[str, Any]


class Answer(NamedTuple):
    """An answer: its words, and the calls of tools in their order."""

    content: str
    calls: list[Call]


@dataclass(frozen=True)
class Parser:
    """One format. `marks` are the texts with which the calls begin. With `first`, they begin the answer or are not there.

    `read` returns the calls in the text from the first mark on. It raises ValueError if that text is no call.
    """

    marks: tuple[str, ...]
    read: Callable[[str], list[Call]]
    first: bool = False

    def parse(self, text: str) -> Answer:
        """Return the words and the calls of a whole answer. If the calls cannot be read, all of it is words."""
        begin, found = self._find(text)
        if not found:
            return Answer(text, [])
        try:
            return Answer(text[:begin].rstrip(), self.read(text[begin:]))
        except (ValueError, RecursionError):
            return Answer(text, [])

    def words(self, text: str) -> int:
        """Return how many characters at the beginning of an unfinished answer are words, whatever follows."""
        begin, found = self._find(text)
        if not found:
            begin = min((len(text) - _overlap(text, mark) for mark in self.marks), default=len(text))
            if self.first and text[:begin].strip():
                return len(text)
        return len(text[:begin].rstrip())  # white space before a call is no content

    def _find(self, text: str) -> tuple[int, bool]:
        """Return where the calls begin, and whether there are any."""
        places = [place for mark in self.marks if (place := text.find(mark)) >= 0]
        begin = min(places, default=len(text))
        return begin, bool(places) and not (self.first and text[:begin].strip())


class CallReader:
    """The words and the calls of one answer, as its text arrives. Calls are returned whole, at the end of the answer."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._text = ""
        self._sent = 0  # characters that were returned as words

    def push(self, text: str) -> str:
        """Add text. Return the words that are certain by now."""
        self._text += text
        words = self._parser.words(self._text)
        new = self._text[self._sent : words]
        self._sent = max(self._sent, words)
        return new

    def finish(self) -> Answer:
        """Return the rest of the words, and the calls. Call it once, after the last text."""
        answer = self._parser.parse(self._text)
        return Answer(answer.content[self._sent :], answer.calls)


def _hermes(text: str) -> list[Call]:
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>, repeated. The last end may be missing."""
    parts = re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL)
    return [_call(_json(part)) for part in parts]


def _llama3_json(text: str) -> list[Call]:
    """{"name": …, "parameters": {…}}, several separated by semicolons, with or without <|python_tag|> before them."""
    text = text.removeprefix("<|python_tag|>").strip()
    calls, at = [], 0
    while at < len(text):
        value, at = DECODER.raw_decode(text, at)
        calls.append(_call(value, ("arguments", "parameters")))
        rest = text[at:]
        at = len(text) - len(rest.lstrip().removeprefix(";").lstrip())
    return calls


def _mistral(text: str) -> list[Call]:
    """[TOOL_CALLS][{"name": …, "arguments": {…}}, …], or as newer models write it: [TOOL_CALLS]name{…}, repeated."""
    calls: list[Call] = []
    for part in text.split("[TOOL_CALLS]")[1:]:
        if part.lstrip().startswith("["):
            values = _json(part)
            calls += map(_call, values)
            continue
        head, brace, rest = part.partition("{")  # the head may also have [CALL_ID]… and [ARGS]
        calls.append(_call({"name": head.partition("[")[0].strip(), "arguments": _json(brace + rest)}))
    return calls


PARSERS: Mapping[str, Parser] = {
    "hermes": Parser(("<tool_call>",), _hermes),
    "llama3_json": Parser(("<|python_tag|>", "{"), _llama3_json, first=True),
    "llama4_json": Parser(("<|python_tag|>", "{"), _llama3_json, first=True),
    "mistral": Parser(("[TOOL_CALLS]",), _mistral),
}


def parser_for(rendered: Sequence[tuple[str, Sequence[Call]]]) -> str | None:
    """Return the name of the first parser that reads all calls of these answers as they were written, or None.

    `rendered`: answers as a chat template renders them, with their calls.
    """

    def reads(parser: Parser, text: str, calls: Sequence[Call]) -> bool:
        return same_calls(parser.parse(text).calls, calls)

    return next((name for name, one in PARSERS.items() if all(reads(one, *answer) for answer in rendered)), None)


def same_calls(calls: Sequence[Call], others: Sequence[Call]) -> bool:
    """Return whether both have equal calls in the same order. Arguments are equal as JSON values: the order of keys does
    not count, 1 equals 1.0, and true does not equal 1."""
    return len(calls) == len(others) and all(
        call.name == other.name and _canonical(call.arguments) == _canonical(other.arguments)
        for call, other in zip(calls, others, strict=True)
    )


def _canonical(value: Any) -> Any:
    """Return a value that equals another's if both are equal as JSON."""
    if isinstance(value, dict):
        return {name: _canonical(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(one) for one in value]
    return (type(value) is bool, value)


def _call(value: Any, keys: Sequence[str] = ("arguments",)) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("a call has no name")
    arguments = next((value[key] for key in keys if key in value), None)
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are not an object")
    return Call(value["name"], arguments)


def _json(text: str) -> Any:
    """Return the JSON value that the text is. Raises ValueError."""
    return DECODER.decode(text)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of the text may be the beginning of the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def tool_for_template(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as chat templates get it, in training and from the engine: the fields of its function in vLLM's order,
    without those that are null."""
    order = dict.fromkeys((*("name", "description", "parameters"), *function))
    return {"type": "function", "function": {key: function[key] for key in order if function.get(key) is not None}}


def calls_of(message: Mapping[str, Any]) -> Iterator[Call]:
    """Yield the calls of a message in OpenAI's form, with arguments that are objects."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield Call(function["name"], function["arguments"])
