"""The proxy before the API server understands requests, and does with events and requests what a test asks for."""

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from testbed.faults import Strike, running
from worlds.faults.apiproxy import ApiProxy, Call, Verdict, Waiting, call_of
from worlds.serving import eventually, listening

PODS = "/api/v1/namespaces/team-a/pods"
JOBS = "/apis/graft.dev/v1alpha1/namespaces/team-a/finetunejobs"


@pytest.mark.parametrize(
    ("method", "path", "call"),
    [
        ("GET", f"{PODS}?limit=1", Call("list", "pods", "team-a", "")),
        ("GET", "/api/v1/pods?watch=true", Call("watch", "pods", "", "")),
        ("GET", f"{PODS}/x", Call("get", "pods", "team-a", "x")),
        ("PATCH", f"{JOBS}/first/status", Call("patch", "finetunejobs/status", "team-a", "first")),
        ("DELETE", "/api/v1/namespaces/team-a", Call("delete", "namespaces", "", "team-a")),
        ("POST", f"{PODS}/x/eviction", Call("create", "pods/eviction", "team-a", "x")),
    ],
)
def test_a_request_is_understood(method: str, path: str, call: Call) -> None:
    assert call_of(method, path) == call


def event(name: str, value: int) -> dict[str, object]:
    return {"type": "MODIFIED", "object": {"metadata": {"name": name, "namespace": "team-a"}, "value": value}}


EVENTS = [event("a", 1), event("b", 1), event("a", 2)]


class Server:
    """An API server with one watch and one counter."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.app = web.Application()
        self.app.router.add_route("*", "/{path:.*}", self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            self.asked.append(f"{request.method} {request.query_string}")
            return web.json_response({})
        response = web.StreamResponse()
        await response.prepare(request)
        for item in EVENTS:
            await response.write(json.dumps(item).encode() + b"\n")
        await asyncio.sleep(3600)
        return response


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, ApiProxy]]:
    server = Server()
    async with listening(server.app) as address:
        with running(ApiProxy(f"http://{address}")) as proxy:
            yield server, proxy


async def seen(proxy: ApiProxy, number: int) -> list[tuple[str, int]]:
    """Return the first events that a watch gets."""
    async with aiohttp.ClientSession() as session, session.get(f"{proxy.endpoint}/api/v1/pods?watch=true") as answer:
        found = [json.loads(await answer.content.readline()) for _ in range(number)]
    return [
        (
            item["object"].get("metadata", {}).get("name", item["type"]),
            item["object"].get("value", item["object"].get("code")),
        )
        for item in found
    ]


async def test_events_pass_are_dropped_wait_and_change_places(server: tuple[Server, ApiProxy]) -> None:
    _, proxy = server
    assert await seen(proxy, 3) == [("a", 1), ("b", 1), ("a", 2)]

    def last_only(waiting: Waiting) -> Verdict:
        if waiting.age < 0.2:
            return Verdict.HOLD
        return Verdict.DROP if waiting.superseded else Verdict.PASS

    proxy.gate(last_only)
    assert await seen(proxy, 2) == [("b", 1), ("a", 2)]
    proxy.gate(lambda waiting: Verdict.BEHIND if waiting.item["metadata"]["name"] == "b" else Verdict.PASS)
    assert await seen(proxy, 3) == [("a", 1), ("a", 2), ("b", 1)]


async def test_a_watch_ends_with_an_error_and_the_events_that_wait_are_lost(server: tuple[Server, ApiProxy]) -> None:
    _, proxy = server
    proxy.gate(lambda waiting: Verdict.HOLD)
    first = asyncio.create_task(seen(proxy, 1))
    await eventually(proxy.watches)
    proxy.end_watches("watch pods", 410)
    assert await first == [("ERROR", 410)]


async def test_a_frozen_list_asks_for_the_old_state(server: tuple[Server, ApiProxy]) -> None:
    seen_by, proxy = server
    proxy.freeze("7")
    async with aiohttp.ClientSession() as session:
        await session.get(f"{proxy.endpoint}{PODS}?limit=1")
        await session.get(f"{proxy.endpoint}{PODS}/x")
    assert seen_by.asked == ["GET limit=1&resourceVersion=7&resourceVersionMatch=Exact", "GET "]


@pytest.mark.parametrize(
    ("how", "forwarded", "killed"), [(Strike.BEFORE, 0, 1), (Strike.AFTER, 1, 1), (Strike.RESET, 1, 0)]
)
async def test_a_struck_request_gets_no_answer(
    server: tuple[Server, ApiProxy], how: Strike, forwarded: int, killed: int
) -> None:
    seen_by, proxy = server
    kills: list[int] = []
    proxy.kill = lambda: kills.append(1)
    proxy.strike = lambda method, path, body: how
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"{proxy.endpoint}{PODS}", data=b"{}")  # aiohttp repeats a PUT by itself
    assert (len(seen_by.asked), len(kills)) == (forwarded, killed)
