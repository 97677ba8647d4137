"""The tokens that the gateway counts, by model and namespace. Clients get the counts that they ask for, and no others."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web
from worlds.engine import BASE, make_base, running
from worlds.gateway import MODEL, World, events, sse, table, world
from worlds.serving import break_off, eventually

COUNTS = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def counts(completion: int) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 5 + completion}


def event(text: str | None, usage: dict[str, int] | None) -> bytes:
    choices = [] if text is None else [{"text": text}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


async def vllm(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Answer as vLLM does, with the counts that `stream_options` asks for."""
    asked = body.get("stream_options") or {}
    if not body.get("stream"):
        return web.json_response({"choices": [{"text": "ab"}], "usage": COUNTS})
    async with sse(request) as response:
        for number, text in enumerate("ab", 6):
            running = counts(number) if asked.get("continuous_usage_stats") else None
            await response.write(event(text, running))
        if asked.get("include_usage"):
            await response.write(event(None, COUNTS))
        await response.write(b"data: [DONE]\n\n")
    return response


async def counted(made: World, prompt: int, completion: int, model: str = MODEL) -> bool:
    labels = f'model="{model}",model_namespace="team-a"'
    return await made.metric(f'graft_gateway_tokens_total{{{labels},type="prompt"}} {prompt}.0') and await made.metric(
        f'graft_gateway_tokens_total{{{labels},type="completion"}} {completion}.0'
    )


async def test_the_tokens_of_answers_and_streams_are_counted() -> None:
    async with world() as made:
        made.engines[0].answer = vllm
        async with made.post() as response:
            assert (await response.json())["usage"] == COUNTS
        assert await counted(made, 5, 7)
        async with made.post(stream=True) as response:
            first, second, done = events(await response.read())
        assert "usage" not in first and "usage" not in second and done == "[DONE]"  # the client has not asked
        assert await counted(made, 10, 14)


async def test_a_client_gets_the_counts_that_it_asks_for() -> None:
    async with world() as made:
        made.engines[0].answer = vllm
        async with made.post(stream=True, stream_options={"include_usage": True}) as response:
            first, second, last, _ = events(await response.read())
        assert "usage" not in first and "usage" not in second and last["usage"] == COUNTS and last["choices"] == []
        options = {"include_usage": True, "continuous_usage_stats": True}
        async with made.post(stream=True, stream_options=options) as response:
            first, second, last, _ = events(await response.read())
        assert [first["usage"], second["usage"], last["usage"]] == [counts(6), counts(7), COUNTS]
        async with made.post(stream=True, stream_options={"continuous_usage_stats": True}) as response:
            assert all("usage" not in one for one in events(await response.read())[:-1])


async def test_the_tokens_of_a_stream_that_its_client_ends_are_counted() -> None:
    async with world() as made:

        async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            async with sse(request) as response:
                await response.write(event("a", counts(6)))
                await asyncio.sleep(30)
            return response

        made.engines[0].answer = answer
        async with made.post(stream=True) as response:
            await response.content.readline()
        await eventually(lambda: counted(made, 5, 6))


async def test_a_stream_that_another_replica_continues_is_counted_once() -> None:
    async with world(2) as made:
        broken = asyncio.Event()

        async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if broken.is_set():
                return await vllm(request, body)
            broken.set()
            async with sse(request) as response:
                await response.write(event("a", counts(6)))
                await asyncio.sleep(0.05)
                break_off(request)
            return response

        for engine in made.engines:
            engine.answer = answer
        async with made.post(stream=True, temperature=0) as response:
            assert events(await response.read())[-1] == "[DONE]"
        assert await counted(made, 5, 7)


async def test_wrong_counts_of_an_engine_are_not_counted() -> None:
    async with world() as made:

        async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            usage = {"prompt_tokens": -5, "completion_tokens": "7", "total_tokens": True}
            return web.json_response({"choices": [{"text": "ab"}], "usage": usage})

        made.engines[0].answer = answer
        async with made.post() as response:
            assert response.status == 200
        async with made.session.get(made.metrics_url) as response:
            assert "graft_gateway_tokens_total{" not in await response.text()


async def test_the_tokens_of_a_real_engine_are_counted(tmp_path: Path) -> None:
    async with running(make_base(tmp_path / "base")) as api, world() as made:
        part = table(f"{api.client.host}:{api.client.port}")
        part.backends[0].loaded = [BASE]
        part.routes[1].targets[0].engine_model = BASE
        made.update(part)
        body = {"model": "team-a/plain", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        for more in ({}, {"stream": True}):
            async with made.post(body | more, "/v1/completions") as response:
                assert response.status == 200 and await response.read()
        assert await counted(made, 10, 8, "team-a/plain")
