"""Clients without a key, or with the key of another team, that try to use or to see models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from graft.contracts.apikeys import GRANT_KEY, Accepted, Grant, new_api_key
from graft.contracts.enginekeys import fingerprint
from graft.contracts.gateway import RouteEntry, Routes, RouteTarget
from graft_server.gateway.apikeys import ApiKeys
from worlds.gateway import MODEL, World, refused, table, world

OWN, OTHER = new_api_key(), new_api_key()
VICTIM = Routes(
    namespace="team-b",
    deployment="secret",
    base_model="base",
    routes=[RouteEntry(model="team-b/secret", targets=[RouteTarget(engine_model="base")])],
)


def granted(made: World, api_keys: ApiKeys, *grants: Grant) -> None:
    made.update(table(*made.addresses), VICTIM)
    api_keys.update({f"key-{index}": {GRANT_KEY: item.json_text()} for index, item in enumerate(grants)})


def team_a(**fields: Any) -> Grant:
    return Grant(**{"namespace": "team-a", "name": "web", "keys": [Accepted(sha256=fingerprint(OWN))], **fields})


HEADERS = {
    "no key": [],
    "an empty key": [("Authorization", "Bearer ")],
    "the sum of a key in its place": [("Authorization", f"Bearer {fingerprint(OWN)}")],
    "another scheme": [("Authorization", f"Basic {OWN}")],
    "two keys, one of them right": [("Authorization", f"Bearer {OWN}"), ("Authorization", "Bearer x")],
    "a key with another one behind it": [("Authorization", f"Bearer {OWN},{OTHER}")],
    "the key in another header": [("X-Api-Key", OWN), ("Api-Key", OWN), ("Proxy-Authorization", f"Bearer {OWN}")],
    "a header that names a tenant": [("X-Graft-Namespace", "team-a"), ("X-Forwarded-User", "team-a/web"), ("X-Remote-Group", "admin")],
    "a key of a megabyte": [("Authorization", "Bearer " + "x" * 60_000)],
    "the key of no ApiKey": [("Authorization", f"Bearer {OTHER}")],
}  # fmt: skip
PATHS = (
    "/v1/models", f"/v1/models/{MODEL}", "/v1//models", "/v1/models/", "//v1/models", "/v1/../v1/models", "/v1/%6dodels", "/V1/models",
    "/v1/models?api_key=" + OWN,
)  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
async def test_no_model_is_shown_or_used_without_a_key(header: str) -> None:
    """Send no key, half a key, a sum, two keys or headers that name somebody -> 401, or 404 for paths that are none."""
    api_keys = ApiKeys()
    async with world(api_keys=api_keys) as made:
        granted(made, api_keys, team_a())
        for path in PATHS:
            async with made.session.get(made.url + path, headers=HEADERS[header]) as response:
                text = await response.text()
                assert response.status in {400, 401, 404}, (path, text)
                assert MODEL not in text.replace(path, "") and "team-b" not in text
        async with made.session.post(
            made.url + "/v1/chat/completions", json={"model": MODEL, "messages": []}, headers=HEADERS[header]
        ) as response:
            assert response.status in {400, 401}
        assert made.engines[0].requests == []


@pytest.mark.parametrize(
    "models", [None, ["team-b/secret"], ["team-a/support", "team-b/secret"], ["secret"], ["*"], ["../team-b/secret"]]
)
async def test_a_key_opens_nothing_of_another_namespace(models: list[str] | None) -> None:
    """Let a grant name the models of another team -> they do not exist for the key, in lists, cards and completions."""
    api_keys = ApiKeys()
    async with world(api_keys=api_keys) as made:
        granted(made, api_keys, team_a(models=models))
        async with made.get("/v1/models", OWN) as response:
            assert response.status == 200 and "team-b" not in await response.text()
        for name in ("team-b/secret", "team-a/../team-b/secret", "team-b/secret/", " team-b/secret", "TEAM-B/secret"):
            async with made.post(key=OWN, model=name) as response:
                await refused(response, 404, "model_not_found")


async def test_a_sum_that_another_team_lists_opens_only_that_teams_models() -> None:
    """List the sum of another team's key in one's own ApiKey -> the key opens one's own models too, and theirs stay theirs."""
    api_keys = ApiKeys()
    async with world(api_keys=api_keys) as made:
        theirs = Grant(namespace="team-b", name="thief", keys=[Accepted(sha256=fingerprint(OWN))])
        granted(made, api_keys, team_a(), theirs)
        async with made.post(key=OWN) as response:
            assert response.status == 200
        granted(made, api_keys, theirs)  # the owner has revoked the key
        async with made.post(key=OWN) as response:
            await refused(response, 404, "model_not_found")


async def test_a_flood_of_wrong_keys_holds_no_memory() -> None:
    """Send a thousand different keys -> 401 each, and nothing is remembered of them."""
    api_keys = ApiKeys()
    async with world(api_keys=api_keys) as made:
        granted(made, api_keys, team_a())

        async def some(start: int) -> None:
            for number in range(start, start + 100):
                async with made.get("/v1/models", f"graft_{number:043d}") as response:
                    assert response.status == 401

        await asyncio.gather(*(some(start) for start in range(0, 1000, 100)))
        assert len(api_keys._opened) == 1 and not api_keys._running
        assert made.gateway.bytes.used("everybody") == 0
