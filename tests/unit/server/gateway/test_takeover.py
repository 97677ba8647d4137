"""A broken stream continues with the answer of another replica, if that answer must be the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from graft_server.gateway.rewrite import Differs, StreamRewriter, Words
from worlds.gateway import ENGINE_MODEL, GRAFT, MODEL, World, events, sse, world
from worlds.serving import break_off

PIECES = ["Hel", "lo ", "the", "re."]
USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}}


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def spoken(pieces: Iterable[str], chat: bool) -> list[bytes]:
    """Return the events of an answer that consists of `pieces`."""
    if chat:
        opening = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        parts = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        return [event(item) for item in [*opening, *parts, last, USAGE]]
    parts = [{"choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in pieces]
    parts[-1]["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
    return [event(item) for item in [*parts, USAGE]]


def breaks_after(made: World, count: int, other: list[str], chat: bool) -> list[str]:
    """Let the first replica that is asked break after `count` events. The next one answers with `other`.

    Return the log of the models in the requests.
    """
    asked: list[str] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        first = not asked
        asked.append(body["model"])
        async with sse(request) as response:
            for data in spoken(PIECES if first else other, chat)[: count if first else None]:
                await response.write(data)
            if first:
                break_off(request)
            else:
                await response.write(b"data: [DONE]\n\n")
        return response

    for engine in made.engines:
        engine.answer = answer
    return asked


@asynccontextmanager
async def asking(made: World, chat: bool, **fields: Any) -> Any:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": MODEL, **asked, **({"messages": []} if chat else {"prompt": "x"}), **fields}
    async with made.post(body, "/v1/chat/completions" if chat else "/v1/completions") as response:
        assert response.status == 200
        yield response


def text_of(found: list[Any]) -> str:
    choices = [choice for item in found if item != "[DONE]" for choice in item.get("choices", [])]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "other", [PIECES, ["H", "ello th", "ere", "."], ["Hello there."]], ids=["same", "finer", "whole"]
)
async def test_the_client_sees_one_complete_answer(chat: bool, count: int, other: list[str]) -> None:
    async with world(engines=2) as made:
        asked = breaks_after(made, count, other, chat)
        async with asking(made, chat, temperature=0) as response:
            body = await response.read()
        found = events(body)
        assert text_of(found) == "Hello there." and found[-1] == "[DONE]" and asked == [ENGINE_MODEL] * 2
        assert found[0]["graft"] == GRAFT and not [item for item in found[1:-1] if "graft" in item]
        assert {item["model"] for item in found[:-1]} == {MODEL}
        assert [item["usage"]["total_tokens"] for item in found[:-1] if "usage" in item] == [5]
        finished = [c["finish_reason"] for item in found[:-1] for c in item["choices"] if c.get("finish_reason")]
        assert finished == ["stop"]
        assert sum("role" in c.get("delta", {}) for item in found[:-1] for c in item["choices"]) == int(chat)
        assert await made.metric('graft_gateway_retries_total{reason="broken"} 1.0')
        assert await made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="200"}} 1.0')


@pytest.mark.parametrize(
    ("fields", "other", "tries", "words"),
    [
        ({"temperature": 0.7}, PIECES, 1, "the connection to the engine broke before the answer was complete"),
        ({}, PIECES, 1, "the connection to the engine broke before the answer was complete"),
        ({"seed": 1, "logprobs": 1}, PIECES, 1, "the connection to the engine broke before the answer was complete"),
        ({"seed": 1}, ["Hello", " you"], 2, "another replica's answer is not the same"),
        ({"seed": 1}, ["H"], 2, "another replica's answer is not the same"),
    ],
    ids=["random", "unsaid", "logprobs", "other", "shorter"],
)
async def test_a_broken_stream_ends_with_an_error_if_the_answers_may_differ(
    fields: dict[str, Any], other: list[str], tries: int, words: str
) -> None:
    async with world(engines=2) as made:
        asked = breaks_after(made, 3, other, chat=False)
        async with asking(made, False, **fields) as response:
            *_, last = events(await response.read())
        assert last["error"]["code"] == "upstream_error" and words in last["error"]["message"]
        assert len(asked) == tries
        assert await made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="broken"}} 1.0')


async def test_a_broken_stream_ends_with_an_error_if_there_is_no_other_replica() -> None:
    async with world() as made:
        breaks_after(made, 2, PIECES, chat=False)
        async with asking(made, False, temperature=0) as response:
            found = events(await response.read())
        assert text_of(found) == "Hello " and found[-1]["error"]["code"] == "model_unavailable"


def test_a_stream_with_several_choices_or_other_content_is_not_restarted() -> None:
    for choices in (
        [{"index": 1, "text": "x"}],
        [{"index": 0, "text": "x"}, {"index": 1, "text": "y"}],
        [{"index": 0, "delta": {"reasoning_content": "hm"}}],
        [{"index": 0, "delta": {"tool_calls": [{}]}}],
    ):
        rewriter = StreamRewriter(Words("m", {}))
        assert rewriter.can_begin_again
        rewriter.feed(event({"choices": choices}))
        assert not rewriter.can_begin_again


def test_an_event_without_its_blank_line_is_completed_before_the_restart() -> None:
    rewriter = StreamRewriter(Words("m", {}))
    cut = event({"choices": [{"text": "a"}]})[:-1]
    assert rewriter.feed(cut).endswith(b"}\n") and rewriter.begin_again() == b"\n"
    went_on = rewriter.feed(event({"choices": [{"text": "a"}]}) + event({"choices": [{"text": "b"}]}))
    assert went_on.count(b"\n") == 2 and went_on.endswith(b"\n\n") and rewriter.gap() == b""


def test_a_second_answer_that_is_shorter_than_the_first_differs() -> None:
    rewriter = StreamRewriter(Words("m", {}))
    rewriter.feed(event({"choices": [{"text": "long answer"}]}) + b'data: {"choices": [{"te')
    rewriter.begin_again()
    assert rewriter.feed(event({"choices": [{"text": "long "}]})) == b""
    with pytest.raises(Differs):
        rewriter.feed(b"data: [DONE]\n\n")
