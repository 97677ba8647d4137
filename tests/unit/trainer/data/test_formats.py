"""The fields of people's files: OpenAI's, ShareGPT's, Alpaca's and others become the same messages, or are refused."""

import io
import json
from typing import Any

import pytest
from graft.api.recipe import Dataset
from graft_trainer.data.dataset import Reading, read_examples
from graft_trainer.data.example import Example
from graft_trainer.data.formats import parser_of
from graft_trainer.data.lines import BadLine, record_of
from graft_trainer.data.tokens import tokenise_one
from graft_trainer.run.failures import Failure
from testbed.shell import REPOSITORY
from worlds.trainer import make_tokenizer

USER = {"role": "user", "content": "Weather in Oslo?"}
ANSWER = {"role": "assistant", "content": "It rains."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"train": {"uri": "s3://bucket/train.jsonl"}} | fields)


def read(record: dict[str, Any], **fields: Any) -> Example:
    return parser_of(dataset(**fields))(1, record_of(json.dumps(record).encode()))


def messages(*given: dict[str, Any], **record: Any) -> list[dict[str, Any]]:
    return list(read({"messages": list(given)} | record).messages or ())


def refused(record: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadLine) as caught:
        read(record, **fields)
    return str(caught.value)


def reading(lines: list[str], **fields: Any) -> Reading:
    data = io.BytesIO("\n".join(lines).encode())
    return read_examples(data, dataset(**fields), role="train", uri="s3://bucket/train.jsonl", limit=None)


@pytest.mark.parametrize(
    "calling",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "weather", "arguments": {"town": "Oslo"}}]},
        {"function_call": {"name": "weather", "arguments": '{"town": "Oslo"}'}},
    ],
    ids=["object", "arguments as text", "calls as text", "flat", "function_call"],
)
def test_every_form_of_a_call_becomes_the_same_call_with_arguments_as_an_object(calling: dict[str, Any]) -> None:
    for content in ({}, {"content": None}, {"content": ""}):
        *_, last = messages(USER, {"role": "assistant"} | content | calling)
        assert last == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_ids_and_results_of_calls_are_kept() -> None:
    called = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "c1"} | CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": ""}
    assert messages(USER, called, result, ANSWER) == [USER, called, result, ANSWER]


def test_arguments_that_are_absent_or_empty_are_an_empty_object() -> None:
    for function in ({"name": "now"}, {"name": "now", "arguments": ""}, {"name": "now", "arguments": None}):
        *_, last = messages(USER, {"role": "assistant", "tool_calls": [{"function": function}]})
        assert last["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    ("calling", "problem"),
    [
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "function.arguments is a list, not an object",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]}, "function.arguments is not valid JSON"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": ' + "9" * 5000 + "}"}}]},
            "arguments is not valid",
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": {"a": float("nan")}}}]},
            "arguments has NaN or an infinite",
        ),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "tool_calls[0].function has no name"),
        ({"tool_calls": [{"function": {"name": "f", "parameters": {}}}]}, "must be named arguments"),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, 'type is "custom", not function'),
        ({"tool_calls": {"name": "f"}}, "tool_calls is a object, not a list"),
        ({"tool_calls": [CALL], "function_call": {"name": "f"}}, "both tool_calls and function_call"),
        ({"tool_calls": [CALL], "role": "user"}, "only the assistant calls tools"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_by_name(calling: dict[str, Any], problem: str) -> None:
    assert problem in refused({"messages": [USER, {"role": "assistant"} | calling]})


def test_tools_come_in_openais_form_whatever_form_they_had() -> None:
    function = TOOL["function"]
    for given in ({"tools": [TOOL]}, {"tools": [function]}, {"tools": json.dumps([TOOL])}, {"functions": [function]}):
        assert read({"messages": [USER, ANSWER]} | given).tools == (TOOL,)
    for absent in (None, [], "", "[]"):
        assert read({"messages": [USER, ANSWER], "tools": absent}).tools is None
    assert "both tools and functions" in refused({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [function]})
    assert "tools[0] has no name" in refused({"messages": [USER, ANSWER], "tools": [{"type": "function"}]})
    assert "tools is a object, not a list" in refused({"messages": [USER, ANSWER], "tools": TOOL})


def test_a_message_with_weight_0_is_context_and_not_learned() -> None:
    bad = {"role": "assistant", "content": "Bad."}
    for flag in ({"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}):
        example = read({"messages": [USER, bad | flag, USER, ANSWER | {"weight": 1}]})
        assert example.messages == (USER, bad | {"learn": False}, USER, ANSWER)
        ((ids, learned),) = tokenise_one(example, tokenizer := make_tokenizer())
        text = tokenizer.decode([token for token, learn in zip(ids, learned, strict=True) if learn])
        assert text == "It rains.</s>"
        assert "Bad." in tokenizer.decode(ids)


def test_messages_after_the_last_learned_answer_are_left_out() -> None:
    assert messages(USER, ANSWER, USER, {"role": "assistant", "content": "Bad.", "weight": 0}) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (ANSWER | {"weight": 0.5}, "messages[1].weight is 0.5, not 0 or 1"),
        (ANSWER | {"weight": True}, "messages[1].weight is true, not 0 or 1"),
        (ANSWER | {"train": 1}, "messages[1].train is 1, not true or false"),
        (ANSWER | {"train": False, "weight": 1}, "weight and train contradict each other"),
        (ANSWER | {"weight": 0}, "weight is 0 for every answer"),
        (ANSWER | {"loss_scale": 0.3}, "messages[1].loss_scale is not supported"),
        (ANSWER | {"train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail is not supported"),
        (ANSWER | {"audio": {"id": "a"}}, "messages[1].audio is not supported"),
        (ANSWER | {"name": 3}, "messages[1].name is a number, not a text"),
        (
            ANSWER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            'messages[1].content[0] has the type "image_url": only parts of the type text',
        ),
    ],
)
def test_a_field_of_a_message_that_would_change_what_is_learned_is_refused(
    message: dict[str, Any], problem: str
) -> None:
    assert problem in refused({"messages": [USER, message]})
    assert "only messages of the assistant can be learned" in refused({"messages": [USER | {"weight": 1}, ANSWER]})


def test_older_and_newer_roles_names_parts_and_refusals_are_read() -> None:
    given = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}],
            "name": "anna",
        },
        {"role": "assistant", "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "12:00"},
        {"role": "assistant", "content": None, "refusal": "No.", "audio": None, "tool_calls": None},
    ]
    assert messages(*given) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nthere", "name": "anna"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}],
        },
        {"role": "tool", "name": "now", "content": "12:00"},
        {"role": "assistant", "content": "No."},
    ]
    system, developer = {"role": "system", "content": "A"}, {"role": "developer", "content": "B"}
    assert messages(system, developer, USER, ANSWER)[:1] == [{"role": "system", "content": "A\n\nB"}]


def test_further_fields_of_a_message_reach_the_template() -> None:
    assert messages(USER, ANSWER | {"reasoning_content": "Clouds."})[-1]["reasoning_content"] == "Clouds."
    assert "learn" not in messages(USER, ANSWER | {"learn": False})[-1], "only weight and its like decide that"


def test_sharegpts_conversations_are_read() -> None:
    turns = [
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains.", "markdown": None, "model": "x"},
    ]
    expected = (
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        ANSWER,
    )
    record = {"id": "1", "system": "Be brief.", "tools": json.dumps([TOOL["function"]])}
    example = read(record | {"conversations": turns})
    assert (example.messages, example.tools) == (expected, (TOOL,))
    assert example.unread == {"id", "conversations[].model"}
    assert read(record | {"talk": turns}, columns={"messages": "talk"}).messages == expected
    inside = [{"from": "system", "value": "Be brief."}, *turns]
    assert read(record | {"conversations": inside}).messages == expected
    record["system"] = "Be long."
    assert "system and the messages both have a system message" in refused(record | {"conversations": inside})
    assert 'conversations[0].from is "x", not one of' in refused({"conversations": [{"from": "x", "value": "a"}]})
    assert "conversations[1].value is empty" in refused({"conversations": [turns[0], {"from": "gpt", "value": ""}]})


def test_weights_of_sharegpts_turns_are_honoured() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bad.", "weight": 0}]
    example = read({"conversations": [*turns, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good."}]})
    assert [message.get("learn", True) for message in example.messages or ()] == [True, False, True, True]


def test_alpacas_system_and_history_are_earlier_messages() -> None:
    record = {
        "instruction": "Weather in Oslo?",
        "output": "It rains.",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    example = read(record, format="instruction")
    assert example.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        USER,
        ANSWER,
    )
    templates = {"format": "instruction", "templates": ["{instruction}"]}
    assert "system: spec.dataset.templates have no place for it" in refused(record, **templates)
    record |= {"system": "", "history": []}
    assert read(record, **templates).prompt == "Weather in Oslo?"
    problem = refused(record | {"history": [["Hi"]]}, format="instruction")
    assert 'history[0] is ["Hi"], not a pair (question, answer)' in problem


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "response"), ("prompt", "response")])
def test_other_names_of_instruction_and_output_are_read(names: tuple[str, str]) -> None:
    record = dict(zip(names, ("Weather in Oslo?", "It rains."), strict=True))
    assert read(record, format="instruction").messages == (USER, ANSWER)
    example = read(record | {"context": "Now."}, format="instruction", templates=["{instruction} {input}"])
    assert (example.prompt, example.answer) == ("Weather in Oslo? Now.", "It rains.")


def test_of_a_prompt_and_a_completion_in_messages_only_the_completion_is_learned() -> None:
    example = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert example.messages == (USER, ANSWER | {"learn": False}, USER, ANSWER)


@pytest.mark.parametrize(
    "extra",
    [
        {"chosen": [ANSWER], "rejected": [ANSWER]},
        {"images": ["a.png"]},
        {"documents": [{"text": "x"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"labels": [1, 2]},
        {"weight": 0.5},
        {"weight": 0},
    ],
)
def test_a_field_of_a_line_that_would_change_what_is_learned_is_refused(extra: dict[str, Any]) -> None:
    for fields in ({"messages": [USER, ANSWER]}, {"instruction": "Hi", "output": "Hello"}, {"text": "Hi"}):
        kind = {"messages": "chat", "instruction": "instruction", "text": "text"}[next(iter(fields))]
        assert refused(fields | extra, format=kind).startswith(f"{next(iter(extra))}: ")
        neutral = {name: None if name == "weight" else [] for name in extra}
        assert read(fields | neutral, format=kind).unread == frozenset()
    pair = {"prompt": "Hi", "completion": "Hello", "label": False}
    assert "label: preference pairs" in refused(pair, format="instruction")


def test_fields_that_nothing_reads_are_counted_by_name() -> None:
    lines = [json.dumps({"messages": [USER, ANSWER], "id": number, "source": "web"}) for number in range(3)]
    lines.append(json.dumps({"messages": [USER, ANSWER], "id": 4, "source": None, "parallel_tool_calls": False}))
    assert reading(lines).unread == {"id": 4, "source": 3, "parallel_tool_calls": 1}
    named = json.dumps({"messages": [USER | {"name": "anna"}, ANSWER | {"mood": "calm", "weight": 1}], "a\nb" * 99: 1})
    assert {"messages[].name", "messages[].mood"} < set(found := reading([named]).unread)
    assert len(found) == 3 and all(name.isprintable() and len(name) <= 64 for name in found)
    many = json.dumps({"messages": [USER, ANSWER]} | {f"f{number}": 1 for number in range(1000)})
    assert len(reading([many]).unread) <= 64


def test_a_number_of_5000_digits_makes_its_line_invalid() -> None:
    good = json.dumps({"messages": [USER, ANSWER]})
    huge = good[:-1] + ', "id": ' + "9" * 5000 + "}"
    with pytest.raises(Failure) as caught:
        reading([good, huge, good])
    assert "line 2: a number has too many digits" in caught.value.message
    found = reading([good, huge, good], onInvalid="skip")
    assert (found.total, found.invalid) == (2, 1)


def test_the_example_with_tools_has_calls_in_every_line() -> None:
    for name, count, calls in (("train", 120, 1), ("heldout", 24, 1)):
        lines = (REPOSITORY / "examples/tools/data" / f"{name}.jsonl").read_text().splitlines()
        found = reading(lines)
        assert (found.total, found.unread) == (count, {})
        for example in found.examples:
            made = [message for message in example.messages or () if message.get("tool_calls")]
            assert len(made) == calls and len(example.tools or ()) == 2
            assert isinstance(made[0]["tool_calls"][0]["function"]["arguments"]["order"], int)
