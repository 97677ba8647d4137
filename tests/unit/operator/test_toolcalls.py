"""Calls of tools in answers: the formats of today's models, whole and as they arrive."""

import json

import pytest
from graft.toolcalls import PARSERS, Answer, Call, CallReader, parser_for, same_calls
from worlds.templates import ANSWERS, OLDER, OSLO, ROME

WORDS = [
    "It rains.",
    "",
    "a < b, a <tool, [TOOL and {braces}",
    '<tool_call>{"name": "weather"}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"town": ',
    '<tool_call>{"name": "weather", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"n": NaN}}</tool_call>',
    "<tool_call>" + "[" * 100_000,
    '{"answer": 42}',
    '{"name": "weather", "parameters": {"town": "Oslo"}} and more',
    "[TOOL_CALLS]",
    '[TOOL_CALLS][{"name": "weather"}]',
    "[TOOL_CALLS]weather",
]


@pytest.mark.parametrize(
    ("parser", "text", "answer"),
    [(name, *one) for answers in (ANSWERS, OLDER) for name, all in answers.items() for one in all],
)
def test_calls_are_read_whole_and_as_they_arrive(parser: str, text: str, answer: Answer) -> None:
    assert PARSERS[parser].parse(text) == answer
    for size in (1, 3, len(text)):
        assert streamed(parser, text, size) == answer


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", WORDS)
def test_what_is_no_call_stays_words(parser: str, text: str) -> None:
    assert PARSERS[parser].parse(text) == Answer(text, [])
    if len(text) < 10_000:
        assert streamed(parser, text, 1) == Answer(text, [])


def streamed(parser: str, text: str, size: int) -> Answer:
    reader = CallReader(PARSERS[parser])
    words = "".join(reader.push(text[at : at + size]) for at in range(0, len(text), size))
    rest = reader.finish()
    return Answer(words + rest.content, rest.calls)


def test_words_are_returned_as_soon_as_they_are_certain() -> None:
    reader = CallReader(PARSERS["hermes"])
    assert [reader.push(text) for text in ("I ", "look", ". <to", "ol x", " <tool_call>{")] == [
        "I",
        " look",
        ".",
        " <tool x",
        "",
    ]
    assert CallReader(PARSERS["llama3_json"]).push("It rains.") == "It rains."


def test_the_parser_is_found_by_the_calls_that_it_reads() -> None:
    for name, answers in ANSWERS.items():
        assert parser_for([(text, answer.calls) for text, answer in answers]) == name
    assert parser_for([("weather(town='Oslo')", [OSLO])]) is None
    assert parser_for([("<tool_call>{}</tool_call>", [OSLO])]) is None


def test_calls_are_equal_as_json_values_and_in_order() -> None:
    first = Call("f", json.loads('{"a": 1, "b": [true, {"c": null}]}'))
    assert same_calls([first], [Call("f", {"b": [True, {"c": None}], "a": 1.0})])
    for other in ({"a": True, "b": [True, {"c": None}]}, {"a": 1}, {"a": 1, "b": [1, {"c": None}]}):
        assert not same_calls([first], [Call("f", other)])
    assert not same_calls([OSLO, ROME], [ROME, OSLO])
    assert not same_calls([OSLO], [OSLO, ROME])
    assert not same_calls([OSLO], [Call("climate", OSLO.arguments)])
