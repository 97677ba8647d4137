"""Clients of the CPU engine that send what costs much. The agent's requests are answered meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from graft_server.engine import app
from worlds.attackers import LongestPause, Slowed, guarded, raw, request, send_then_read
from worlds.engine import BASE, Api, make_base, running
from worlds.serving import eventually

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest_asyncio.fixture
async def api(base: Path) -> AsyncIterator[Api]:
    async with running(base) as made:
        yield made


async def send(api: Api, body: bytes, path: str = COMPLETIONS, **headers: str) -> tuple[int, Any]:
    async with api.client.post(path, data=body, headers={**JSON, **headers}) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_compressed_bodies(api: Api, path: str) -> None:
    """Send a few KB that unpack to 10 MB -> 415, and nothing is unpacked."""
    bomb = gzip.compress(b'{"prompt": ' + b"[" * (10 << 20))
    for encoding in ("gzip", "deflate", "br", "x"):
        status, answer = await send(api, bomb, path, **{"Content-Encoding": encoding})
        assert (status, answer["error"]["code"]) == (415, 415)


FLOODS = {
    "nested": b'{"prompt": ' + b"[" * (3 << 20),
    "empty lists": b'{"prompt": [' + b"[]," * (1 << 20) + b"[]]}",
    "wrong lists": b'{"prompt": [' + b'["a"],' * 30_000 + b"[1]]}",
    "wrong ids": b'{"prompt": [' + b'"a",' * 60_000 + b"1]}",
    "wrong messages": b'{"messages": [' + b"1," * 60_000 + b"1], " + b'"prompt": []}',
    "wrong parts": b'{"messages": [{"role": "user", "content": [' + b"1," * 60_000 + b'1]}], "prompt": ""}',
    "many messages": b'{"prompt": [], "messages": [' + b'{"role":"u"},' * 30_000 + b'{"role":"u"}]}',
    "biases": b'{"prompt": [], "messages": [], "logit_bias": {'
    + b",".join(b'"x%d":1' % at for at in range(60_000))
    + b"}}",
    "stops": b'{"prompt": [], "messages": [], "stop": [' + b'"",' * 60_000 + b'""]}',
    "long stop": b'{"prompt": "x", "messages": [], "stop": "' + b"x" * 100_000 + b'"}',
    "quotes": b'"' + b'\\"' * (1_500_000),
    "half a character": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udc00"}]}',
    "template": b'{"messages": [{"role": "user", "content": "x"}], "prompt": [], "chat_template_kwargs": {"a": [1]}}',
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_bodies_of_many_values(api: Api, flood: str) -> None:
    """Send JSON that becomes a gigabyte of objects or of faults -> 400; loop and memory stay free."""
    tracemalloc.start()
    try:
        async with LongestPause() as pause:
            for path in (COMPLETIONS, CHAT):
                status, answer = await send(api, FLOODS[flood], path)
                assert status == 400 and len(json.dumps(answer)) < 10_000, answer
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80 << 20 and pause.seconds < 1.5
    assert api.server.bytes.used("everybody") == 0


async def test_bytes_in_flight(base: Path) -> None:
    """Send many large bodies at once -> 503 with Retry-After beyond the bound, and the agent's requests are answered."""
    async with running(base, max_bytes_in_flight=1_000_000, body_timeout=5) as api:

        async def slowly() -> AsyncIterator[bytes]:
            yield b'{"prompt": "' + b"x" * 300_000
            await asyncio.sleep(2)
            yield b'"}'

        async def ask() -> tuple[int, bool]:
            async with api.client.post(COMPLETIONS, data=slowly(), headers=JSON) as response:
                return response.status, "Retry-After" in response.headers

        asked = [asyncio.create_task(ask()) for _ in range(6)]
        await eventually(lambda: sum(task.done() for task in asked) == 3)
        assert [task.result() for task in asked if task.done()] == [(503, True)] * 3
        assert (await api.unload("nobody"))[0] == 404
        assert {status for status, _ in await asyncio.gather(*asked)} == {400, 503}  # 400: longer than the context


@pytest.mark.parametrize(
    ("size", "status", "encoding"), [(11, 413, "identity"), (30, 413, "identity"), (30, 415, "gzip")]
)
async def test_refused_bodies_of_clients_that_send_before_they_read(
    base: Path, size: int, status: int, encoding: str
) -> None:
    """Send MBs that are refused, and read only after the last byte -> the client reads the status, and no reset."""
    async with (
        running(base, max_body_bytes=1_000_000) as api,
        guarded(api.server.application()) as (host, port, connections),
    ):
        headers = {"Content-Encoding": encoding}
        answer = await asyncio.to_thread(send_then_read, host, port, size * 1_000_000, COMPLETIONS, **headers)
        assert answer == (status, "close")
        await eventually(lambda: not connections.open)


@pytest.mark.parametrize("what", ["parse_body", "_tokenize"])
async def test_a_caller_that_disconnects_while_a_thread_holds_its_body(
    base: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send large bodies and disconnect -> what the thread holds counts until it ends, and no second one begins."""
    async with running(base) as api, guarded(api.server.application()) as (host, port, connections):
        place: Any = app if what == "parse_body" else api.server._generator
        slow = Slowed(getattr(place, what))
        monkeypatch.setattr(place, what, slow)

        def used() -> int:
            return api.server.bytes.used("everybody")

        large = request(b'{"prompt": "' + b"x" * 1_000_000 + b'"}', b"Content-Type: application/json")
        try:
            async with raw(host, port) as [one]:
                one.send(large)
                await eventually(lambda: slow.calls == 1)
            await eventually(lambda: not connections.open)
            async with raw(host, port) as [one]:
                one.send(large)
                await eventually(lambda: used() > 2_000_000)
            await eventually(lambda: not connections.open and used() < 2_000_000)
            await asyncio.sleep(0.1)
            assert used() > 1_000_000 and slow.calls == 1
        finally:
            slow.go.set()
        await eventually(lambda: used() == 0)
        assert slow.calls == 1


async def test_the_agents_requests_are_small(api: Api) -> None:
    """Send 1 MB to the route that loads adapters, or a name without end -> 413, 400."""
    assert (await send(api, b'{"lora_name": "' + b"x" * (1 << 20) + b'"}', "/v1/load_lora_adapter"))[0] == 413
    assert (await api.load("x" * 1000, "/nowhere"))[0] == 400


async def test_unfinished_heads_and_bodies(base: Path) -> None:
    """Open connections with half a head or half a body on each -> closed within the deadlines."""
    async with (
        running(base, body_timeout=0.5) as api,
        guarded(api.server.application(), head_seconds=0.5) as (host, port, connections),
        raw(host, port, 50) as heads,
        raw(host, port, 5) as bodies,
    ):
        for one in heads:
            one.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
        for one in bodies:
            one.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert {(await one.head(10)).split()[1] for one in bodies} == {b"408"}
        assert all(await asyncio.gather(*(one.closed(15) for one in [*heads, *bodies])))
        await eventually(lambda: not connections.open)
        assert (await api.post(COMPLETIONS, model=BASE, prompt="x", max_tokens=2))[0] == 200
