"""Clients behind an Ingress: one of them pretends to be another, or uses up what all of them share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from graft_server.gateway.callers import Proxies, networks
from graft_server.gateway.settings import Settings, parse
from worlds.attackers import Raw, body_of, guarded, raw, request
from worlds.gateway import ENGINE_MODEL, MODEL, refused, world
from worlds.serving import eventually

PROXIES = networks("10.0.0.0/8, fd00::/8, 192.0.2.7")
COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("peer", "headers", "caller"),
    [
        ("10.1.2.3", ["203.0.113.9"], "203.0.113.9"),
        ("10.1.2.3", ["198.51.100.1, 203.0.113.9"], "203.0.113.9"),  # the left one is what the client has written
        ("10.1.2.3", ["198.51.100.1", "203.0.113.9, 10.9.9.9"], "203.0.113.9"),
        ("10.1.2.3", ["203.0.113.9, 192.0.2.7"], "203.0.113.9"),
        ("10.1.2.3", ["10.7.7.7, 10.8.8.8"], "10.7.7.7"),  # a client inside the proxies' network
        ("10.1.2.3", [], "10.1.2.3"),
        ("10.1.2.3", [""], "10.1.2.3"),
        ("10.1.2.3", ["203.0.113.9:4711"], "203.0.113.9"),
        ("::ffff:10.1.2.3", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("fd00::1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ("fd00::1", ["[2001:db8:1:2::9]:443"], "2001:db8:1:2::/64"),
        ("fd00::1%eth0", ["203.0.113.9"], "203.0.113.9"),
    ],
)
def test_the_caller_is_the_rightmost_address_that_is_no_proxys(peer: str, headers: list[str], caller: str) -> None:
    """A client writes X-Forwarded-For itself -> only what trusted proxies have appended counts."""
    assert Proxies(PROXIES).caller(peer, headers) == caller


@pytest.mark.parametrize("peer", ["203.0.113.9", "2001:db8::1", "::ffff:203.0.113.9", "", "unknown"])
def test_an_untrusted_peer_cannot_name_a_caller(peer: str) -> None:
    """A client without a proxy, or a pod, sends X-Forwarded-For -> ignored."""
    for proxies in (Proxies(PROXIES), Proxies()):
        assert proxies.caller(peer, ["198.51.100.1"]) == peer


@pytest.mark.parametrize(
    "entry", ["unknown", "_hidden", "1.2.3.4.5", "203.0.113.9/0", "x" * 60_000, "[::1", "1" * 5000, "\x00"]
)
def test_an_entry_that_is_no_address_is_the_proxys(entry: str) -> None:
    """A header has text, a huge number or a half address at its right end -> counted for the proxy, at once."""
    assert Proxies(PROXIES).caller("10.1.2.3", [f"198.51.100.1, {entry}"]) in {"10.1.2.3", "::/64"}


def test_a_long_chain_is_read_from_its_right_end_only() -> None:
    """A header has 10,000 trusted addresses -> 16 are read, and what a client wrote before them does not count."""
    header = "198.51.100.1, " + ", ".join(["10.1.1.1"] * 10_000)
    assert Proxies(PROXIES).caller("10.1.2.3", [header]) == "10.1.1.1"
    assert Proxies(PROXIES).caller("10.1.2.3", ["198.51.100.1", *["10.1.1.1"] * 64]) == "10.1.1.1"


def test_all_addresses_are_no_proxies(capsys: pytest.CaptureFixture[str]) -> None:
    """An administrator trusts 0.0.0.0/0, so that everybody could name a caller -> the gateway does not start."""
    assert parse(["--trusted-proxies", "10.0.0.0/8,fd00::/8"]).trusted_proxies == networks("10.0.0.0/8,fd00::/8")
    assert parse([]).trusted_proxies == Settings().trusted_proxies == ()
    for wrong in ("0.0.0.0/0", "::/0", "10.0.0.1/8", "proxy"):
        with pytest.raises(SystemExit):
            parse(["--trusted-proxies", wrong])
    assert "--trusted-proxies" in capsys.readouterr().err


def held(made: Any, go: asyncio.Event) -> None:
    async def slow(request: web.Request, body: Any) -> web.StreamResponse:
        await go.wait()
        return web.json_response({"model": ENGINE_MODEL, "choices": []})

    made.engines[0].answer = slow


async def test_a_client_behind_an_ingress_uses_up_its_own_bytes_only() -> None:
    """A client behind an Ingress keeps large requests running, with new keys -> 429 for it, and other clients are answered."""
    trusted = networks("127.0.0.0/8")
    async with world(trusted_proxies=trusted, max_bytes_per_peer=1_000_000) as made:
        go = asyncio.Event()
        held(made, go)

        async def ask(client: str, key: int, size: int) -> Any:
            headers = {"X-Forwarded-For": f"198.51.100.{key}, {client}", "Authorization": f"Bearer {key}"}
            body = {"model": MODEL, "prompt": "x" * size}
            return await made.session.post(made.url + COMPLETIONS, json=body, headers=headers)

        asked = [asyncio.create_task(ask("203.0.113.9", key, 300_000)) for key in range(3)]
        await eventually(lambda: len(made.engines[0].requests) == 3)
        await refused(await ask("203.0.113.9", 4, 300_000), 429, "too_many_bytes_in_flight")
        other = asyncio.create_task(ask("203.0.113.10", 5, 300_000))
        await eventually(lambda: len(made.engines[0].requests) == 4)
        go.set()
        assert {response.status for response in await asyncio.gather(*asked, other)} == {200}


async def test_a_client_behind_an_ingress_takes_its_own_connections_only() -> None:
    """A client behind an Ingress keeps many requests running -> 503 beyond its bound, also with forged entries; others pass.

    The Ingress itself may have more connections than one client, and a direct client still has its bound.
    """
    trusted = networks("127.0.0.0/8")
    async with world(trusted_proxies=trusted) as made:
        go = asyncio.Event()
        held(made, go)
        limits: dict[str, Any] = {"most": 40, "per_peer": 5, "head_seconds": 30}
        app, shared = made.gateway.application(), Proxies(trusted).trusts
        async with guarded(app, shared, **limits) as (host, port, connections), raw(host, port, 14) as opened:

            def send(one: Raw, client: str, forged: int) -> None:
                entry = f"X-Forwarded-For: 198.51.100.{forged}, {client}".encode()
                one.send(request(body_of('"seed": 1'), entry))

            for number, one in enumerate(opened[:5]):
                send(one, "203.0.113.9", number)
            await eventually(lambda: len(made.engines[0].requests) == 5)
            for number, one in enumerate(opened[5:8]):
                send(one, "203.0.113.9", 50 + number)
                answer = await one.head()
                assert answer.split()[1] == b"503" and b"Retry-After" in answer
            for number, one in enumerate(opened[8:13]):
                send(one, f"203.0.113.{20 + number}", 0)
            await eventually(lambda: len(made.engines[0].requests) == 10)
            go.set()
            busy = [*opened[:5], *opened[8:13]]
            assert {(await one.head()).split()[1] for one in busy} == {b"200"}
            send(opened[13], "203.0.113.9", 1)  # its earlier requests have ended
            assert (await opened[13].head()).split()[1] == b"200"
        await eventually(lambda: not connections.open)
        assert not connections._peers
