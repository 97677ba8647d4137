"""Clients that try to use more than the limits of their key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web
from graft.contracts.apikeys import GRANT_KEY, Accepted, Grant, new_api_key
from graft.contracts.enginekeys import fingerprint
from graft.contracts.gateway import Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.usage import Allowance
from graft_server.configmaps import ConfigMaps
from graft_server.gateway.apikeys import ApiKeys
from graft_server.gateway.ledger import Ledger
from worlds.gateway import MODEL, Record, World, refused, table, world
from worlds.serving import eventually

KEY = new_api_key()


@asynccontextmanager
async def limited(
    allowance: Allowance, record: Record | None = None, api_keys: ApiKeys | None = None, **settings: Any
) -> AsyncIterator[World]:
    """Run a gateway with a key that has limits."""
    api_keys = ApiKeys() if api_keys is None else api_keys
    ledger = Ledger(cast(ConfigMaps, record or Record({})), "gw-0")
    leasing = asyncio.create_task(ledger.run())
    async with world(api_keys=api_keys, ledger=ledger, **settings) as made:
        grant = Grant(namespace="team-a", name="web", keys=[Accepted(sha256=fingerprint(KEY))], allowance=allowance)
        api_keys.update({"key-web": {GRANT_KEY: grant.json_text()}})
        yield made
    leasing.cancel()


async def _endless(request: web.Request, body: Any) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits for this answer")


async def test_a_client_that_disconnects_before_its_answer_pays_for_it() -> None:
    """Ask for a long answer without a stream, and disconnect while the engine works -> the reservation is spent."""
    async with limited(Allowance(tokens_per_month=1000)) as made:
        made.engines[0].answer = _endless
        asked = asyncio.create_task(made.post(key=KEY, max_tokens=900).__aenter__())
        await eventually(lambda: made.engines[0].requests)
        asked.cancel()
        await eventually(lambda: made.gateway.in_flight == 0)
        async with made.post(key=KEY, max_tokens=900) as response:
            await refused(response, 429, "rate_limit_exceeded")
        assert len(made.engines[0].requests) == 1


async def test_an_answer_that_takes_too_long_is_paid() -> None:
    """Ask for an answer that the engine cannot finish in time -> 504, and the reservation is spent."""
    async with limited(Allowance(tokens_per_month=1000), idle_timeout=0.3) as made:
        made.engines[0].answer = _endless
        async with made.post(key=KEY, max_tokens=900) as response:
            await refused(response, 504, "timeout")
        async with made.post(key=KEY, max_tokens=900) as response:
            await refused(response, 429, "rate_limit_exceeded")


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_a_request_that_the_engine_refuses_costs_no_tokens(status: int) -> None:
    """Let the engine refuse -> the next request may still use all tokens."""
    async with limited(Allowance(tokens_per_month=1000)) as made:

        async def no(request: web.Request, body: Any) -> web.StreamResponse:
            return web.json_response({"error": {"message": "no", "code": status}}, status=status)

        made.engines[0].answer = no
        for _ in range(2):
            async with made.post(key=KEY, max_tokens=900) as response:
                assert response.status in {status, 502, 503}


async def test_a_client_that_disconnects_in_a_later_step_pays_for_it() -> None:
    """Ask a sequence of adapters, and disconnect while the second one works -> the reservation is spent."""
    steps = [RouteTarget(engine_model=name, adapter=name, version="1.0.0") for name in ("first", "second")]
    async with limited(Allowance(tokens_per_month=1000)) as made:
        begun = list[str]()

        async def answer(request: web.Request, body: Any) -> web.StreamResponse:
            begun.append(body["model"])
            if len(begun) == 2:
                await asyncio.sleep(30)
            usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
            return web.json_response({"choices": [{"message": {"content": "a"}}], "usage": usage})

        made.engines[0].answer = answer
        backend = Backend(pod="pod-0", address=made.addresses[0], loaded=["first", "second"])
        made.update(
            Routes(
                namespace="team-a",
                deployment="dep",
                base_model="base",
                routes=[RouteEntry(model=MODEL, targets=[], steps=steps)],
                backends=[backend],
            )
        )
        asked = asyncio.create_task(made.post(key=KEY, max_tokens=450).__aenter__())
        await eventually(lambda: len(begun) == 2)
        asked.cancel()
        await eventually(lambda: made.gateway.in_flight == 0)
        async with made.post(key=KEY, max_tokens=450) as response:
            await refused(response, 429, "rate_limit_exceeded")


class Slow(Record):
    """A record that answers when it may."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def get(self, name: str) -> dict[str, Any]:
        self.asked.set()
        await self.go.wait()
        return await super().get(name)


async def test_a_key_that_is_revoked_while_a_request_waits_for_its_limits_is_refused() -> None:
    """Revoke the key while the gateway leases for a request of it -> 401, and no engine gets the request."""
    record, api_keys = Slow(), ApiKeys()
    async with limited(Allowance(tokens_per_month=1000), record, api_keys) as made:
        asked = asyncio.create_task(made.post(key=KEY, max_tokens=10).__aenter__())
        await record.asked.wait()
        api_keys.update({})
        record.go.set()
        await refused(await asked, 401, "invalid_api_key")
        assert made.engines[0].requests == []


async def test_a_key_that_is_revoked_while_a_request_waits_for_a_pod_is_refused() -> None:
    """Revoke the key while its request waits for a sleeping deployment -> 401, when a pod is there."""
    api_keys = ApiKeys()
    async with limited(Allowance(tokens_per_month=1000), None, api_keys) as made:
        made.update(table(idle_seconds=60))
        asked = asyncio.create_task(made.post(key=KEY, max_tokens=10).__aenter__())
        await eventually(lambda: made.gateway.waiting.holds(MODEL))
        api_keys.update({})
        made.update(table(*made.addresses))
        await refused(await asked, 401, "invalid_api_key")
        assert made.engines[0].requests == []
