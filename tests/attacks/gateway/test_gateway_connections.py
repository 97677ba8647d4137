"""Clients that keep the gateway's connections: unfinished heads and bodies, too many, too early, or never read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from graft_server.inflight import Account
from worlds.attackers import Raw, body_of, guarded, raw, request, send_then_read
from worlds.gateway import ENGINE_MODEL, MODEL, events, sse, world
from worlds.serving import eventually

COMPLETIONS = "/v1/completions"


async def test_unfinished_heads() -> None:
    """Open 300 connections and send half a head on each, byte by byte -> all are closed within the deadline."""
    async with world() as made, guarded(made.gateway.application(), head_seconds=1.0) as (host, port, connections):
        began = asyncio.get_running_loop().time()
        async with raw(host, port, 300) as opened:
            for one in opened:
                one.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
            dripping = asyncio.create_task(_drip(opened))
            async with raw(host, port) as [honest]:  # is answered meanwhile
                honest.send(request(body_of('"seed": 1')))
                assert (await honest.head()).split()[1] == b"200"
            await asyncio.gather(*(one.closed(5) for one in opened))
            dripping.cancel()
        assert asyncio.get_running_loop().time() - began < 4
        await eventually(lambda: not connections.open)


async def _drip(opened: list[Raw]) -> None:
    while True:
        await asyncio.sleep(0.1)
        for one in opened:
            one.send(b"x")


async def test_connections_that_are_never_used() -> None:
    """Open connections and send nothing, or blank lines -> closed within the deadline."""
    async with world() as made, guarded(made.gateway.application(), head_seconds=0.5) as (host, port, _):
        async with raw(host, port, 20) as opened:
            for one in opened[:10]:
                one.send(b"\r\n\r\n\r\n")
            assert all(await asyncio.gather(*(one.closed(3) for one in opened)))
        async with raw(host, port) as [second]:  # the second request of a connection has the same deadline
            second.send(request(body_of('"seed": 1')))
            assert (await second.head()).split()[1] == b"200"
            second.send(b"POST /v1/completions HTT")
            assert await second.closed(3)


@pytest.mark.parametrize("pause", [0.0, 0.01])
async def test_large_heads(pause: float) -> None:
    """Send 60 KB of headers, at once or one by one -> 431 after a bounded number of bytes, and the connection is closed."""
    async with (
        world() as made,
        guarded(made.gateway.application(), head_bytes=32_000) as (host, port, _),
        raw(host, port) as [one],
    ):
        lines = [b"X-%d: " % at + b"x" * 1000 + b"\r\n" for at in range(60)]
        head = [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", *lines, b"\r\n"]
        for part in head if pause else [b"".join(head)]:
            one.send(part)
            await asyncio.sleep(pause)
        assert (await one.head()).split()[1:2] in ([b"431"], [])  # it may be lost when the connection is reset
        assert await one.closed(3)
        async with raw(host, port) as [other]:
            other.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(lines[:20]) + b"\r\n")
            assert (await other.head()).split()[1] == b"200"


async def test_more_connections_than_allowed() -> None:
    """Fill all connections of an address -> idle ones make room; if all are busy, probes work and requests get 503."""
    limits = {"most": 20, "per_peer": 10, "head_seconds": 30}
    async with world() as made, guarded(made.gateway.application(), **limits) as (host, port, connections):
        go = asyncio.Event()

        async def slow(request: web.Request, body: Any) -> web.StreamResponse:
            await go.wait()
            return web.json_response({"model": ENGINE_MODEL, "choices": []})

        made.engines[0].answer = slow
        async with raw(host, port, 10):
            await asyncio.sleep(1.1)
            async with raw(host, port, 10) as fresh:  # take the places of those that have sent nothing
                for one in fresh:
                    one.send(request(body_of('"seed": 1')))
                await eventually(lambda: len(made.engines[0].requests) == 10)
                assert len(connections.open) == 10
                async with raw(host, port, 2) as [probe, more]:
                    probe.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert (await probe.head()).split()[1] == b"200"
                    more.send(request(body_of('"seed": 1')))
                    answer = await more.head()
                    assert answer.split()[1] == b"503" and b"Retry-After" in answer
                go.set()
                assert {(await one.head()).split()[1] for one in fresh} == {b"200"}
        async with raw(host, port, 60) as many:
            await eventually(lambda: connections.refused > 0)
            assert len(connections.open) <= 26 and many


async def test_requests_sent_in_advance() -> None:
    """Send hundreds of requests behind a running one -> the connection is closed, they are not kept in memory."""
    async with world() as made, guarded(made.gateway.application()) as (host, port, _), raw(host, port) as [one]:

        async def slow(request: web.Request, body: Any) -> web.StreamResponse:
            await asyncio.sleep(30)
            raise AssertionError

        made.engines[0].answer = slow
        one.send(request(body_of('"seed": 1')))
        await eventually(lambda: made.engines[0].requests)
        for at in range(20):
            one.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-%d: " % at + b"x" * 4000 + b"\r\n\r\n")
        assert await one.closed(3)
        await eventually(lambda: made.engines[0].cancelled == 1)


async def test_a_client_that_does_not_read_its_stream() -> None:
    """Ask for a long stream and read nothing -> the connection is closed, and the engine's work ends."""
    async with world() as made, guarded(made.gateway.application(), send_seconds=0.5) as (host, port, _):

        async def endless(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                while True:
                    await response.write(
                        b"data: " + json.dumps({"choices": [{"text": "x" * 30_000}]}).encode() + b"\n\n"
                    )

        made.engines[0].answer = endless
        async with raw(host, port) as [one]:
            one.send(request(body_of('"stream": true')))
            await eventually(lambda: made.engines[0].cancelled == 1, seconds=15)


async def test_a_body_that_never_arrives() -> None:
    """Announce a body and send it byte by byte -> 408 after the deadline, and the connection is closed."""
    async with (
        world(body_timeout=0.5) as made,
        guarded(made.gateway.application()) as (host, port, _),
        raw(host, port) as [one],
    ):
        one.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        dripping = asyncio.create_task(_drip([one]))
        assert (await one.head()).split()[1] == b"408"
        assert await one.closed(8)
        dripping.cancel()


REFUSED_BODIES: dict[str, tuple[int, int, dict[str, str], dict[str, Any]]] = {
    "announced as 11 MB": (413, 11_000_000, {}, {"max_body_bytes": 1_000_000}),
    "announced as 30 MB": (413, 30_000_000, {}, {}),
    "compressed": (415, 30_000_000, {"Content-Encoding": "gzip"}, {}),
    "more than the caller may hold": (429, 9_000_000, {}, {"max_bytes_per_caller": 2_000_000}),
    "more than all may hold": (503, 9_000_000, {}, {"max_bytes_in_flight": 2_000_000}),
}


@pytest.mark.parametrize("kind", REFUSED_BODIES)
async def test_refused_bodies_of_clients_that_send_before_they_read(kind: str) -> None:
    """Send MBs that are refused, and read only after the last byte -> the client reads the status, and no reset."""
    status, size, headers, settings = REFUSED_BODIES[kind]
    async with world(**settings) as made, guarded(made.gateway.application()) as (host, port, connections):
        for name in ("peer 127.0.0.1", "everybody"):  # other requests hold nearly all that the smallest account allows
            made.gateway.bytes.begin([Account(name, "test", 2_000_000)]).add(1_950_000)
        answer = await asyncio.to_thread(send_then_read, host, port, size, COMPLETIONS, **headers)
        assert answer == (status, "close")
        await eventually(lambda: not connections.open)


async def test_a_body_that_is_never_read_does_not_free_the_next_head_from_its_bounds() -> None:
    """Send a body where none is expected, then half a head -> the head's deadline holds."""
    async with world() as made, guarded(made.gateway.application(), head_seconds=0.5) as (host, port, connections):
        async with raw(host, port) as [one]:
            one.send(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            assert (await one.head()).split()[1] == b"405"
            await asyncio.sleep(0.1)
            for _ in range(10):  # while the rest of the body is read, it is no head
                one.send(b"x" * 10_000)
                await asyncio.sleep(0.1)
            one.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            while b"200" not in (head := await one.head()).splitlines()[0]:
                assert head
            one.send(b"GET /healthz HTT")
            assert await one.closed(3)
        await eventually(lambda: not connections.open)


async def test_a_stream_through_the_guard_is_not_changed() -> None:
    """Not an attack: a stream arrives event by event through a guarded connection."""
    async with world() as made, guarded(made.gateway.application()) as (host, port, _):

        async def answer(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                for at in range(50):
                    await response.write(b'data: {"choices": [{"text": "%d"}]}\n\n' % at)
                await response.write(b"data: [DONE]\n\n")
            return response

        made.engines[0].answer = answer
        body = {"model": MODEL, "prompt": "x", "stream": True}
        for _ in range(3):  # on one connection
            async with made.session.post(f"http://{host}:{port}{COMPLETIONS}", json=body) as response:
                seen = events(await response.read())
            assert [event["choices"][0]["text"] for event in seen[:-1]] == [str(at) for at in range(50)]
