"""Tools in chats: they reach the chat template, and calls in answers become tool_calls, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graft.api.recipe import Dataset
from graft_server.engine.calls import for_template
from graft_server.engine.model import load_base_model
from graft_server.engine.protocol import ApiError, ChatRequest
from graft_server.engine.settings import Settings, parse
from graft_trainer.data.formats import parser_of
from graft_trainer.data.tokens import prompt_ids
from transformers import AutoTokenizer
from worlds.engine import Api, make_caller, running

CHAT = "/v1/chat/completions"
FUNCTION = {"name": "weather", "description": "W", "parameters": {"type": "object"}}
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Oslo?"}],
    "tools": [{"type": "function", "function": FUNCTION}],
}
CALL = {"name": "weather", "arguments": {"town": "Oslo"}}
HERMES = f"I look.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
ANSWERS = {
    "hermes": (HERMES, None, "I look."),
    "llama3_json": (json.dumps({"name": "weather", "parameters": {"town": "Oslo"}}), None, None),
    "mistral": ('[TOOL_CALLS]weather{"town": "Oslo"}', "[TOOL_CALLS]", None),
}


@pytest.mark.parametrize("parser", ANSWERS)
async def test_calls_in_answers_become_tool_calls(tmp_path: Path, parser: str) -> None:
    answer, control, words = ANSWERS[parser]
    base = make_caller(tmp_path / "base", ASK, answer, control)
    async with running(base, tool_call_parser=parser) as api:
        status, whole = await api.post(CHAT, **ASK, temperature=0, max_tokens=120)
        assert status == 200, whole
        choice = whole["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == words
        assert call["type"] == "function" and call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"town": "Oslo"}
        assert (len(call["id"]) == 9) == (parser == "mistral")

        chunks = await api.stream(CHAT, **ASK, temperature=0, max_tokens=120)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content") or "" for delta in deltas) == (words or "")
        (streamed,) = [one for delta in deltas for one in delta.get("tool_calls", ())]
        assert streamed["index"] == 0 and streamed["function"] == call["function"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

        status, plain = await api.post(CHAT, **ASK, temperature=0, max_tokens=120, tool_choice="none")
        said = plain["choices"][0]
        assert said["message"]["content"] == answer.removeprefix(control or "")
        assert "tool_calls" not in said["message"] and said["finish_reason"] == "stop"

        cut = await api.post(CHAT, **ASK, temperature=0, max_tokens=15)
        assert cut[1]["choices"][0]["finish_reason"] == "length"
        assert "tool_calls" not in cut[1]["choices"][0]["message"]


async def test_without_a_parser_tools_are_refused_unless_no_call_is_wanted(api: Api) -> None:
    status, answer = await api.post(CHAT, **ASK)
    assert (status, answer["error"]["param"]) == (400, "tool_choice")
    assert "--tool-call-parser" in answer["error"]["message"] and "spec.toolCallParser" in answer["error"]["message"]
    assert (await api.post(CHAT, **ASK, tool_choice="none", max_tokens=2))[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tool_choice": "required"}, 'tool_choice: this engine supports "none" and "auto"'),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "cannot force a call"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "auto", "tools": None}, "`tools` must be set"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"description": "W"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": ASK["tools"] * 129}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "messages[0].tool_calls"),
        ({"functions": [FUNCTION]}, "functions: this engine does not support it"),
    ],
)
async def test_a_request_for_calls_that_cannot_be_given_is_refused(base: Path, body: dict[str, Any], says: str) -> None:
    async with running(base, tool_call_parser="hermes") as api:
        status, answer = await api.post(CHAT, **ASK | body)
        assert status == 400, answer
        assert says in answer["error"]["message"]


def test_messages_reach_the_template_as_vllm_sends_them() -> None:
    system, developer, user = (
        {"role": role, "content": text} for role, text in (("system", "A"), ("developer", "B"), ("user", "C"))
    )
    assert for_template([system, user, developer], "{{ m.role }}") == [{"role": "system", "content": "A\n\nB"}, user]
    assert for_template([developer, user], "{% if m.role == 'developer' %}") == [developer, user]

    def called(arguments: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}}],
        }

    for text in ('{"a": 1}', {"a": 1}):
        assert for_template([called(text)], "") == [called({"a": 1})]
    for broken in ('{"a": ', "[1]", "", None, "9" * 5000):
        assert for_template([called(broken)], "") == [called({})]
    assert for_template([user | {"tool_calls": []}, user | {"tool_calls": None}], "") == [user, user]
    with pytest.raises(ApiError):
        for_template([user | {"tool_calls": [{"function": "f"}]}], "")


def test_a_prompt_with_tools_is_tokenized_as_in_training(tmp_path: Path) -> None:
    base = make_caller(tmp_path / "base", ASK, "x")
    served = load_base_model(Settings(str(base), ("m",)))
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo", "days": 2}'}}
    function = {
        "strict": None,
        "parameters": {"type": "object", "z": None},
        "description": "W",
        "name": "weather",
        "x": 1,
    }
    request = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "rain"},
        ],
        "tools": [{"function": function, "type": "function"}],
    }
    asked = ChatRequest.model_validate(request)
    answer = {"role": "assistant", "content": "It rains."}
    line = request | {"messages": [*request["messages"], answer]}
    dataset = Dataset.model_validate({"train": {"uri": "s3://bucket/train.jsonl"}})
    example = parser_of(dataset)(1, line)
    messages = [message.for_template() for message in asked.messages]
    ids = served.encode_chat(messages, {}, asked.tools_for_template)
    assert ids == prompt_ids(example, AutoTokenizer.from_pretrained(base))
    text = served.decode(ids)
    assert text.startswith(
        '[{"type": "function", "function": {"name": "weather", "description": "W", "parameters": {"type"'
    )
    assert '"x": 1' in text and "strict" not in text and "<system>Be" in text


def test_the_flags_are_vllms() -> None:
    given = ["--model", "m", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    assert parse(given, {}).tool_call_parser == "hermes"
    assert parse([*given[:2], *given[3:]], {}).tool_call_parser is None
    for wrong in (given[:3], [*given[:-1], "unknown"]):
        with pytest.raises(SystemExit):
            parse(wrong, {})
