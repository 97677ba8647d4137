"""A chat template that leaves out tools, roles or calls is reported by line and reason, before a GPU is used."""

from typing import Any

import pytest
from graft.contracts.progress import Reason
from graft_trainer.data.context import unused
from graft_trainer.data.example import Example
from graft_trainer.data.messages import LEARN
from graft_trainer.data.tokens import tokenise
from graft_trainer.run.failures import Failure
from worlds.templates import ASK, CALLS, IM, TEMPLATES, chat_tokenizer

KNOWS_TOOLS = "{%- for t in tools or [] %}{{- t.function.name + '\n' }}{%- endfor %}" + TEMPLATES["calls"]
TOOLS = tuple({"type": "function", "function": {"name": name}} for name in ("weather", "time"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
ASKED = {"role": "user", "content": "Weather in Oslo?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "rain"}
SAID = {"role": "assistant", "content": "It rains."}
NO_ARGUMENTS = TEMPLATES["calls"].replace(
    CALLS, "{%- for c in m.tool_calls or [] %}{{- c.function.name }}{%- endfor %}"
)


def learned(template: str, *messages: dict[str, Any], tools: Any = TOOLS) -> Any:
    example = Example(7, messages=messages, answer="", tools=tools)
    return tokenise([example], chat_tokenizer(template), 4096, role="train")


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (TEMPLATES["calls"], (ASKED, SAID), "leaves out tools[0] (weather)"),
        (
            KNOWS_TOOLS.replace("in tools", "in (tools or [])[:1]").replace(" or [] %}{{- t", " %}{{- t"),
            (ASKED, SAID),
            "tools[1] (time)",
        ),
        (IM + ASK, (ASKED, CALLED), "messages[1]: the base model's chat template leaves out tool_calls"),
        (IM + ASK, (ASKED, CALLED | {LEARN: False}, RESULT, SAID), "leaves out the name in messages[1].tool_calls[0]"),
        (NO_ARGUMENTS, (ASKED, CALLED | {LEARN: False}, RESULT, SAID), "the arguments in messages[1].tool_calls[0]"),
        (
            KNOWS_TOOLS.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'tool' %}"),
            (ASKED, CALLED, RESULT, SAID),
            "leaves out the content of messages[2], whose role is tool",
        ),
        (
            KNOWS_TOOLS.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}"),
            ({"role": "system", "content": "Be brief."}, ASKED, SAID),
            "leaves out the content of messages[0], whose role is system",
        ),
    ],
)
def test_what_the_template_leaves_out_is_named(
    template: str, messages: tuple[dict[str, Any], ...], problem: str
) -> None:
    tools = TOOLS if "tools" in problem else None
    with pytest.raises(Failure) as caught:
        learned(template, *messages, tools=tools)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "line 7" in caught.value.message and problem in caught.value.message
    assert caught.value.remedy


def test_a_template_that_renders_everything_is_used() -> None:
    for messages in ((ASKED, CALLED), (ASKED, CALLED, RESULT, SAID), (ASKED, CALLED | {LEARN: False}, RESULT, SAID)):
        assert len(learned(KNOWS_TOOLS, *messages).examples) >= 1


def test_a_template_that_reads_the_words_is_not_refused_because_of_marks() -> None:
    checks = "{%- for t in tools %}{%- if t.function.name not in ['weather', 'time'] %}{{- raise_exception('no') }}{%- endif %}{%- endfor %}"
    assert len(learned(checks + TEMPLATES["calls"], ASKED, SAID).examples) == 1


def test_a_field_of_a_message_is_used_if_the_template_renders_it() -> None:
    example = Example(1, messages=(ASKED | {"name": "anna", "mood": "calm"}, SAID | {"reasoning_content": "Clouds."}))
    fields = {"id": 3, "messages[].name": 3, "messages[].mood": 2, "messages[].reasoning_content": 1, "x[].y": 1}
    with_name = chat_tokenizer(IM.replace("m.role +", "m.role + (m.name or '') +") + ASK)
    assert list(unused(fields, [example] * 3, with_name)) == [
        "id",
        "messages[].mood",
        "messages[].reasoning_content",
        "x[].y",
    ]
    thinking = chat_tokenizer(TEMPLATES["thought dropped from earlier turns"])
    assert list(unused(fields, [example] * 3, thinking)) == ["id", "messages[].name", "messages[].mood", "x[].y"]
    assert unused(fields, [example], chat_tokenizer(None)) == fields


@pytest.mark.parametrize(
    ("template", "example", "problem"),
    [
        (None, Example(7, messages=(ASKED, CALLED), answer=""), "messages[1] calls tools, but a seq2seq model"),
        (KNOWS_TOOLS, Example(7, messages=(ASKED, CALLED), answer=""), "messages[1] calls tools, but a seq2seq model"),
        (
            None,
            Example(7, messages=(ASKED, SAID), answer="It rains.", tools=TOOLS),
            "no chat template that shows tools",
        ),
        (
            IM + ASK,
            Example(7, messages=(ASKED, SAID), answer="It rains.", tools=TOOLS),
            "leaves out tools[0] (weather)",
        ),
    ],
)
def test_a_seq2seq_model_gets_every_part_or_the_line_is_refused(
    template: str | None, example: Example, problem: str
) -> None:
    with pytest.raises(Failure) as caught:
        tokenise([example], chat_tokenizer(template), 4096, role="train", task="seq2seq")
    assert problem in caught.value.message and caught.value.remedy
    kept = Example(7, messages=(ASKED, SAID), answer="It rains.", tools=TOOLS)
    assert len(tokenise([kept], chat_tokenizer(KNOWS_TOOLS), 4096, role="train", task="seq2seq").examples) == 1
