"""Engines that answer the gateway with what costs much, or with what no client understands."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from aiohttp import web
from graft_server.gateway import proxy
from worlds.attackers import LongestPause, Slowed, body_of, guarded, raw, request
from worlds.gateway import MODEL, refused, sse, world
from worlds.serving import eventually

ANSWERS = {
    "large": b'{"choices": [], "x": "' + b"x" * (60 << 20) + b'"}',
    "nested": b'{"choices": ' + b"[" * (4 << 20),
    "many lists": b'{"choices": [' + b"[]," * (1_500_000) + b"[]]}",
    "half a character": b'{"choices": ["\\ud800"]}',
    "not a number": b'{"choices": [NaN]}',
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answers_of_a_bad_engine(answer: str) -> None:
    """Answer with 60 MB, or with objects without end -> 502, the gateway's memory and loop stay free."""
    async with world(max_answer_values=200_000) as made:

        async def bad(request: web.Request, body: Any) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            for start in range(0, len(ANSWERS[answer]), 1 << 20):
                await response.write(ANSWERS[answer][start : start + (1 << 20)])
            return response

        made.engines[0].answer = bad
        tracemalloc.start()
        try:
            async with LongestPause() as pause, made.post() as response:
                await refused(response, 502, "upstream_error")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100 << 20 and pause.seconds < 1.0
        assert made.gateway.bytes.used("everybody") == 0


async def test_answers_that_are_held_count_as_bytes_in_flight() -> None:
    """Let many large answers arrive at once -> those beyond the bytes in flight get 503, and memory is bounded."""
    async with world(max_bytes_in_flight=5_000_000) as made:
        ready, arrived = asyncio.Event(), 0

        async def large(request: web.Request, body: Any) -> web.StreamResponse:
            nonlocal arrived
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"choices": [], "x": "' + b"x" * 1_400_000)
            arrived += 1
            if arrived == 8:
                ready.set()
            await ready.wait()
            await asyncio.sleep(0.3)
            await response.write(b'"}')
            return response

        made.engines[0].answer = large

        async def ask() -> int:
            async with made.post() as response:
                await response.read()
                return int(response.status)

        statuses = await asyncio.gather(*(ask() for _ in range(8)))
        assert set(statuses) == {200, 503} and statuses.count(200) <= 3
        assert made.gateway.bytes.used("everybody") == 0


async def test_answers_whose_client_is_gone_count_while_a_thread_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disconnect while a large answer is rewritten -> it counts until the thread ends, and no second one begins."""
    slow = Slowed(proxy.rewrite_answer)
    monkeypatch.setattr(proxy, "rewrite_answer", slow)
    async with world() as made, guarded(made.gateway.application()) as (host, port, connections):

        async def large(request: web.Request, body: Any) -> web.StreamResponse:
            return web.json_response({"choices": [], "x": "x" * 1_000_000})

        made.engines[0].answer = large
        try:
            async with raw(host, port) as [one]:
                one.send(request(body_of('"seed": 1')))
                await eventually(lambda: slow.calls == 1)
            await eventually(lambda: not connections.open)
            async with raw(host, port) as [one]:
                one.send(request(body_of('"seed": 1')))
                await eventually(lambda: made.gateway.bytes.used("everybody") > 2_000_000)
            await eventually(lambda: not connections.open and made.gateway.bytes.used("everybody") < 2_000_000)
            await asyncio.sleep(0.1)
            assert made.gateway.bytes.used("everybody") > 1_000_000 and slow.calls == 1
        finally:
            slow.go.set()
        await eventually(lambda: made.gateway.bytes.used("everybody") == 0)
        assert slow.calls == 1


async def test_errors_and_events_of_a_bad_engine() -> None:
    """Answer with strange statuses, headers, usage and events -> an error in OpenAI's shape or a stream that ends."""
    async with world() as made:

        async def bad(request: web.Request, body: Any) -> web.StreamResponse:
            if body.get("stream"):
                async with sse(request) as response:
                    for event in (
                        b'{"choices": 5}',
                        b'{"choices": {"a": 1}}',
                        b'{"choices": [{"delta": {"content": {}}}]}',
                    ):
                        await response.write(b"data: " + event + b"\n\n")
                    await response.write(b"data: " + b"[" * 100_000 + b"\n\ndata: [DONE]\n\n")
                return response
            return web.Response(status=429, body=b"x" * 100, headers={"Retry-After": "\N{SUPERSCRIPT TWO}"})

        made.engines[0].answer = bad
        async with made.post(temperature=0) as response:
            await refused(response, 429, "429")
        async with made.post(stream=True, temperature=0) as response:
            assert response.status == 200 and (await response.read()).endswith(b"data: [DONE]\n\n")
        async with made.post(temperature=0) as response:
            assert "Retry-After" not in response.headers


async def test_streams_that_nobody_reads_count_as_bytes_in_flight() -> None:
    """Ask for many fast streams and read none -> what is buffered counts, and some end with an error event."""
    async with world(max_bytes_in_flight=3_000_000) as made, guarded(made.gateway.application()) as (host, port, _):
        ended = 0

        async def endless(request: web.Request, body: Any) -> web.StreamResponse:
            nonlocal ended
            event = b"data: " + json.dumps({"choices": [{"text": "x" * 200_000}]}).encode() + b"\n\n"
            try:
                async with sse(request) as response:
                    while True:
                        await response.write(event)
            finally:
                ended += 1  # by a cancellation, or because a write failed first

        def broken() -> bool:
            assert made.gateway.bytes.used("everybody") <= 3_000_000
            labels = {"model": MODEL, "status": "broken"}
            value = made.gateway.metrics.registry.get_sample_value("graft_gateway_requests_total", labels)
            return (value or 0) >= 20

        made.engines[0].answer = endless
        async with raw(host, port, 40) as opened:
            for at, one in enumerate(opened):
                one.send(request(body_of('"stream": true'), b"Authorization: Bearer %d" % at))
            await eventually(broken, seconds=60)  # the buffers of the sockets fill up first; this costs CPU time
            await eventually(lambda: ended >= 20, seconds=60)
        await eventually(lambda: made.gateway.bytes.used("everybody") == 0, seconds=60)
