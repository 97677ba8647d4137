"""Who may call the gateway, as its clients see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from graft.contracts.apikeys import GRANT_KEY, KEY, Accepted, Grant, new_api_key
from graft.contracts.enginekeys import fingerprint
from graft.contracts.gateway import Backend, RouteEntry, Routes, RouteTarget
from graft_server.gateway.apikeys import ApiKeys
from graft_server.gateway.settings import parse
from worlds.gateway import MODEL, World, chunk, events, refused, sse, table, world
from worlds.serving import eventually

KEYS = [new_api_key() for _ in range(3)]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def grant(key: str = KEYS[0], namespace: str = "team-a", **fields: Any) -> Grant:
    keys = fields.pop("keys", [Accepted(sha256=fingerprint(key))])
    return Grant(namespace=namespace, name=fields.pop("name", "web"), keys=keys, **fields)


def publish(api_keys: ApiKeys, *grants: Grant) -> None:
    api_keys.update({f"key-{index}": {GRANT_KEY: item.json_text()} for index, item in enumerate(grants)})


def neighbour(address: str) -> Routes:
    """Return the routes of another namespace."""
    return Routes(
        namespace="team-b",
        deployment="dep",
        base_model="base",
        routes=[RouteEntry(model="team-b/plain", targets=[RouteTarget(engine_model="base")])],
        backends=[Backend(pod="pod-b", address=address, loaded=["base"])],
    )


@asynccontextmanager
async def locked(*grants: Grant, clock: Clock | None = None) -> AsyncIterator[tuple[World, ApiKeys]]:
    api_keys = ApiKeys(clock or Clock())
    async with world(api_keys=api_keys) as made:
        made.update(table(*made.addresses), neighbour(made.addresses[0]))
        publish(api_keys, *grants)
        yield made, api_keys


async def listed(made: World, key: str) -> list[str]:
    async with made.get("/v1/models", key) as response:
        assert response.status == 200, await response.text()
        return [item["id"] for item in (await response.json())["data"]]


def test_a_key_is_long_and_scanners_of_secrets_find_it() -> None:
    assert KEY.fullmatch(KEYS[0]) and len(set(KEYS)) == 3


@pytest.mark.parametrize("key", [None, "", "sk-secret", KEYS[1], KEYS[0][:-1], "x" * 5000, "k\u00e9y"])
async def test_without_a_key_that_works_nothing_is_answered(key: str | None) -> None:
    async with locked(grant()) as (made, _):
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/anything"):
            async with made.get(path, key) as response:
                await refused(response, 401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"
        async with made.post(key=key) as response:
            error = await refused(response, 401, "invalid_api_key")
            assert error["type"] == "invalid_request_error" and KEYS[0] not in error["message"]
        assert made.engines[0].requests == []
        async with made.get("/readyz") as response:
            assert response.status == 200


@pytest.mark.parametrize("header", ["Basic {}", "{}", "Bearer", "bearer  {}x", "Bearer {} {}"])
async def test_other_notations_are_refused(header: str) -> None:
    async with locked(grant()) as (made, _):
        headers = {"Authorization": header.format(KEYS[0], KEYS[0])}
        async with made.session.get(made.url + "/v1/models", headers=headers) as response:
            await refused(response, 401, "invalid_api_key")


async def test_metrics_are_not_at_the_port_of_the_clients() -> None:
    """They name the models of all tenants."""
    async with locked(grant()) as (made, _):
        async with made.post(key=KEYS[0]) as response:
            assert response.status == 200
        async with made.get("/metrics", KEYS[0]) as response:
            await refused(response, 404, "not_found")
        assert await made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="200"}} 1.0')


async def test_two_keys_in_one_request_are_refused() -> None:
    async with locked(grant(), grant(KEYS[1], "team-b")) as (made, _):
        headers = [("Authorization", f"Bearer {key}") for key in KEYS[:2]]
        async with made.session.get(made.url + "/v1/models", headers=headers) as response:
            await refused(response, 401, "invalid_api_key")


async def test_a_key_opens_the_models_of_its_namespace_only() -> None:
    async with locked(grant(), grant(KEYS[1], "team-b")) as (made, _):
        assert await listed(made, KEYS[0]) == ["team-a/plain", MODEL]
        assert await listed(made, KEYS[1]) == ["team-b/plain"]
        async with made.post(key=KEYS[0]) as response:
            assert response.status == 200
        said = []
        for name in ("team-b/plain", "team-b/missing"):  # what exists and what does not are answered alike
            async with made.post(key=KEYS[0], model=name) as response:
                said.append(json.dumps(await refused(response, 404, "model_not_found")).replace(name, "NAME"))
            async with made.get(f"/v1/models/{name}", KEYS[0]) as response:
                said.append(json.dumps(await refused(response, 404, "model_not_found")).replace(name, "NAME"))
        assert len(set(said)) == 1


async def test_a_key_with_models_opens_only_these() -> None:
    async with locked(grant(models=["team-a/plain", "team-a/later", "team-b/plain"])) as (made, _):
        assert await listed(made, KEYS[0]) == ["team-a/plain"]
        async with made.post(key=KEYS[0]) as response:
            await refused(response, 404, "model_not_found")
        async with made.post(key=KEYS[0], model="team-b/plain") as response:
            await refused(response, 404, "model_not_found")
        async with made.post(key=KEYS[0], model="team-a/plain") as response:
            assert response.status == 200


async def test_a_key_with_grants_of_two_namespaces_opens_both() -> None:
    async with locked(grant(), grant(namespace="team-b")) as (made, api_keys):
        assert await listed(made, KEYS[0]) == ["team-a/plain", MODEL, "team-b/plain"]
        publish(api_keys, grant())
        assert await listed(made, KEYS[0]) == ["team-a/plain", MODEL]


async def test_changes_hold_at_once() -> None:
    async with locked() as (made, api_keys):
        async with made.post(key=KEYS[0]) as response:
            await refused(response, 401, "invalid_api_key")
        publish(api_keys, grant())
        assert len(await listed(made, KEYS[0])) == 2
        publish(api_keys, grant(KEYS[1]))  # a rotation without overlap
        async with made.post(key=KEYS[0]) as response:
            await refused(response, 401, "invalid_api_key")
        assert len(await listed(made, KEYS[1])) == 2
        api_keys.update({"key-0": {GRANT_KEY: "{"}})
        async with made.post(key=KEYS[1]) as response:
            await refused(response, 401, "invalid_api_key")
        assert not api_keys._opened


async def test_a_key_expires_by_the_gateways_clock() -> None:
    clock = Clock()
    old = Accepted(sha256=fingerprint(KEYS[1]), until=clock.now + 10)
    both = [Accepted(sha256=fingerprint(KEYS[0])), old]
    async with locked(grant(keys=both, expires=clock.now + 20), clock=clock) as (made, _):
        for key in KEYS[:2]:
            assert len(await listed(made, key)) == 2
        clock.now += 10
        async with made.post(key=KEYS[1]) as response:
            error = await refused(response, 401, "invalid_api_key")
            assert "expired" in error["message"]
        assert len(await listed(made, KEYS[0])) == 2
        clock.now += 10
        async with made.post(key=KEYS[0]) as response:
            await refused(response, 401, "invalid_api_key")


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_running_streams_end_with_the_key_where_asked_for(ends: bool, how: str) -> None:
    clock = Clock()
    first = grant(expires=clock.now + 100, end_streams=ends)
    async with locked(first, clock=clock) as (made, api_keys):
        go_on = asyncio.Event()

        async def slowly(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                await response.write(chunk("a"))
                await go_on.wait()
                await response.write(chunk("b") + b"data: [DONE]\n\n")
            return response

        made.engines[0].answer = slowly
        watching = asyncio.create_task(api_keys.watch())
        async with made.post(key=KEYS[0], stream=True) as response:
            assert response.status == 200
            await response.content.readline()
            if how == "revoked":
                publish(api_keys)
            else:
                clock.now += 100
            if not ends:
                api_keys.end_running()
                go_on.set()
            rest = events(await response.read())
        if ends:
            assert rest[-1]["error"]["code"] == "invalid_api_key"
            await eventually(lambda: made.gateway.in_flight == 0)
        else:
            assert rest[-1] == "[DONE]"
        watching.cancel()
        assert not api_keys._running


async def test_the_gateway_is_ready_when_it_has_read_the_keys() -> None:
    api_keys = ApiKeys()
    async with world(api_keys=api_keys) as made:
        async with made.get("/readyz") as response:
            assert response.status == 503 and "API keys" in (await response.json())["reason"]
        async with made.post(key=KEYS[0]) as response:
            await refused(response, 503, "model_unavailable")
        api_keys.update({})
        async with made.get("/readyz") as response:
            assert response.status == 200


def test_authentication_is_on_unless_it_is_switched_off() -> None:
    assert parse([]).authentication == "keys" and parse(["--authentication", "none"]).authentication == "none"
    with pytest.raises(SystemExit):
        parse(["--authentication", "off"])
