"""The limits of an API key over three gateways, which lease them through a real API server."""

import asyncio
import time
from collections import Counter
from contextlib import ExitStack

import aiohttp
import pytest
from aiohttp import web
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.usage import SLICES, USAGE_CONFIGMAP, Usage, month_of, usage_key
from worlds.cluster.front_door import FrontDoor, ask_for, front_door, key_of
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import API, Tenant
from worlds.cluster.tenants import bind, new_tenant
from worlds.serving import listening

BUDGET, REQUESTS, FEWER = 100, 1000, 200
MONTH = 1_796_083_200  # 2026-12-01


class Clock:
    """The clock of all gateways. A minute ends when the test says so."""

    def __init__(self) -> None:
        self.now = MONTH + 10.0

    def __call__(self) -> float:
        return self.now


async def engine(request: web.Request) -> web.Response:
    await request.read()
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    return web.json_response({"id": "c", "choices": [{"text": "hi"}], "usage": usage})


def route(tenant: Tenant, address: str) -> str:
    """Publish a route of the tenant to an engine, as the operator does. Return the model's name."""
    model = f"{tenant.name}/plain"
    routes = Routes(
        namespace=tenant.name, deployment="dep", base_model="base",
        routes=[RouteEntry(model=model, targets=[RouteTarget(engine_model="base")])],
        backends=[Backend(pod="pod", address=address, loaded=["base"])],
    )  # fmt: skip
    metadata = {"name": f"routes-{tenant.name}", "namespace": SYSTEM, "labels": {"graft.dev/component": "routes"}}
    tenant.api.create(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {ROUTES_KEY: routes.json_text()}}
    )
    return model


async def flood(doors: list[FrontDoor], key: str, model: str, count: int) -> Counter[int]:
    """Send requests at the same time, to the gateways in turn. Return how many were answered with which status."""
    body, headers = {"model": model, "prompt": "hello", "max_tokens": 8}, {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> int:
            url = f"{doors[number % len(doors)].url}/v1/completions"
            async with session.post(url, json=body, headers=headers) as answer:
                text = await answer.read()
                if answer.status == 429:
                    assert int(answer.headers["Retry-After"]) >= 1, text
                return answer.status

        return Counter(await asyncio.gather(*map(one, range(count))))


async def test_a_thousand_requests_at_three_gateways_get_what_one_budget_allows(tenant: Tenant) -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", engine)
    clock, part = Clock(), BUDGET // SLICES + 1  # of a slice, which may be left in a gateway
    options = {"authentication": "keys", "max_connections": 4096, "max_connections_per_peer": 4096}
    async with listening(app) as address:
        model = route(tenant, address)
        ask_for(tenant, "web", limits={"requestsPerMinute": BUDGET})
        tenant.until("ApiKey", "web", "Ready", "Issued")
        key = key_of(tenant, "web")
        with ExitStack() as stack, ExitStack() as killed:
            doors = [stack.enter_context(front_door(tenant.api, name, clock, **options)) for name in ("gw-1", "gw-2")]
            third = killed.enter_context(front_door(tenant.api, "gw-3", clock, **options))
            for door in (*doors, third):
                tenant.wait(lambda door=door: door.models(key) == [model], "the gateway knows the key and the model")
            for minute in range(2):
                found = await flood([*doors, third], key, model, REQUESTS if minute == 0 else FEWER)
                assert set(found) == {200, 429} and BUDGET - 3 * part <= found[200] <= BUDGET, found
                clock.now += 60  # nothing is blocked in the next minute
            # A gateway is killed right after it has leased. The others lack its slice in this minute, and nothing in the next.
            assert (await flood([third], key, model, 1))[200] == 1
            killed.close()
            found = await flood(doors, key, model, FEWER)
            assert BUDGET - 3 * part <= found[200] <= BUDGET - 1, found
            clock.now += 60
            found = await flood(doors, key, model, FEWER)
            assert BUDGET - 2 * part <= found[200] <= BUDGET, found


async def test_the_keys_of_a_team_share_its_limit(tenant: Tenant, request: pytest.FixtureRequest) -> None:
    other = new_tenant(tenant.api, tenant.store, request)
    bind(other)
    app = web.Application()
    app.router.add_post("/v1/completions", engine)
    clock = Clock()
    both = {"namespaces": {"names": [tenant.name, other.name]}, "limits": {"requestsPerMinute": 20}}
    team = {"apiVersion": API, "kind": "Tenant", "metadata": {"name": tenant.name}, "spec": both}
    async with listening(app) as address:
        keys = {}
        for one in (tenant, other):
            ask_for(one, "web", limits={"requestsPerMinute": 15})
            one.until("ApiKey", "web", "Ready", "Issued")
            keys[route(one, address)] = key_of(one, "web")
        tenant.api.create(team)
        try:
            tenant.wait(lambda: _limited(tenant) and _limited(other), "the grants have the limit of the team")
            with front_door(tenant.api, "gw-5", clock, authentication="keys") as door:
                for model, key in keys.items():
                    tenant.wait(lambda model=model, key=key: door.models(key) == [model], "the gateway knows the key")
                found = [await flood([door], key, model, 30) for model, key in keys.items()]
                assert [one[200] for one in found] == [15, 5]
                tenant.api.patch("Tenant", None, tenant.name, {"spec": {"limits": None}})
                tenant.wait(lambda: not _limited(tenant) and not _limited(other), "the team has no limit any more")
        finally:
            tenant.api.delete("Tenant", None, tenant.name)


def _limited(tenant: Tenant) -> bool:
    found = tenant.api.list("ConfigMap", SYSTEM)
    mine = [item for item in found if (item["metadata"].get("labels") or {}).get("graft.dev/namespace") == tenant.name]
    return any("tenantAllowance" in item["data"].get("grant.json", "") for item in mine)


async def test_tokens_are_counted_as_the_engine_counts_them(tenant: Tenant) -> None:
    """Each request reserves 10 tokens and spends 5, so 20 fit into 100 although only 10 are reserved at once."""
    app = web.Application()
    app.router.add_post("/v1/completions", engine)
    clock = Clock()
    async with listening(app) as address:
        model = route(tenant, address)
        ask_for(tenant, "web", limits={"tokensPerMinute": 100, "tokensPerMonth": 150})
        tenant.until("ApiKey", "web", "Ready", "Issued")
        key = key_of(tenant, "web")
        with front_door(tenant.api, "gw-4", clock, authentication="keys") as door:
            tenant.wait(lambda: door.models(key) == [model], "the gateway knows the key and the model")
            statuses = [await one_by_one(door, key, model) for _ in range(25)]
            assert statuses == [200] * 19 + [429] * 6  # the last reservation does not fit
            clock.now += 60
            statuses = [await one_by_one(door, key, model) for _ in range(12)]
            assert statuses == [200] * 10 + [429] * 2  # 150 of the month
        _leased_now(tenant)
        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"description": "look again"}})
        tenant.until("ApiKey", "web", "WithinLimits", "MonthUsed")
        entry = tenant.api.get("ConfigMap", SYSTEM, USAGE_CONFIGMAP)
        assert entry is not None and usage_key(tenant.name, "web") in entry["data"]


def _leased_now(tenant: Tenant) -> None:
    """Let the month of the entry be the present one: the operator has its own clock."""
    entry = tenant.api.get("ConfigMap", SYSTEM, USAGE_CONFIGMAP)
    assert entry is not None
    name = usage_key(tenant.name, "web")
    usage = Usage.read(entry["data"][name])
    assert usage.month is not None and usage.month.tokens == 150
    usage.month.start = month_of(time.time())
    tenant.api.patch("ConfigMap", SYSTEM, USAGE_CONFIGMAP, {"data": {name: usage.json_text()}})


async def one_by_one(door: FrontDoor, key: str, model: str) -> int:
    return next(iter(await flood([door], key, model, 1)))
