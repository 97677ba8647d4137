"""A tenant with thousands of routes, and the gateway's time and memory for the others."""

from __future__ import annotations

import time
from typing import Any

import pytest
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft_server.gateway.parts import Parts
from worlds.attackers import LongestPause
from worlds.gateway import MODEL, refused, table, world

DEPLOYMENTS, ROUTES = 250, 128


def routes(at: int, mark: str = "1.0.0", count: int = ROUTES, namespace: str = "team-b") -> dict[str, str]:
    names = [f"{namespace}--a{route}-{mark}--0123456789ab" for route in range(count)]
    entries = [
        RouteEntry(
            model=f"{namespace}/d{at}-{route}", targets=[RouteTarget(engine_model=name, adapter="a", version=mark)]
        )
        for route, name in enumerate(names)
    ]
    backends = [
        Backend(pod=f"p{one}", address=f"10.0.{one}.{at % 250}:8000", loaded=["base", *names]) for one in range(2)
    ]
    part = Routes(namespace=namespace, deployment=f"d{at}", base_model="base", routes=entries, backends=backends)
    return {ROUTES_KEY: part.json_text()}


@pytest.fixture(scope="module")
def crowd() -> dict[str, dict[str, str]]:
    """The ConfigMaps of one tenant's 250 deployments with 128 routes each."""
    return {f"routes-{at}": routes(at) for at in range(DEPLOYMENTS)}


async def test_a_change_parses_only_what_changed(crowd: dict[str, dict[str, str]]) -> None:
    """Change routes all the time in a namespace with 32,000 -> each change parses one ConfigMap, others wait for ms."""
    async with world() as made:
        others = {"routes-0x": {ROUTES_KEY: table(*made.addresses).json_text()}}
        made.gateway.update({**crowd, **others})
        parsed = made.gateway.parts.parsed
        seconds = []  # of CPU time
        for at in range(5):
            changed: dict[str, Any] = {**crowd, **others, "routes-7": routes(7, f"2.0.{at}")}
            began = time.process_time()
            made.gateway.update(changed)
            seconds.append(time.process_time() - began)
        assert made.gateway.parts.parsed == parsed + 5
        assert sorted(seconds)[2] < 0.5, seconds  # parsing 500 deployments took 1.7 s; this takes 15 ms
        model = made.gateway.parts.table.find("team-b/d7-3")
        assert model is not None and model.targets[0].version == "2.0.4"
        # The API server's list comes anew every minute: equal texts cost no parsing.
        made.gateway.update({name: {ROUTES_KEY: str(data[ROUTES_KEY])} for name, data in changed.items()})
        assert made.gateway.parts.parsed == parsed + 5
        async with LongestPause() as pause:
            for _ in range(20):
                async with made.post({"model": "team-b/none", "prompt": "x"}, "/v1/completions") as response:
                    await refused(response, 404, "model_not_found")
            async with made.session.get(made.url + "/v1/models") as response:
                assert len((await response.json())["data"]) == DEPLOYMENTS * ROUTES + 2
            async with made.post() as response:
                assert response.status == 200 and (await response.json())["model"] == MODEL
        assert pause.seconds < 3.0  # reading 32,000 models in the test's own client is most of it


def test_an_unknown_model_costs_no_search(crowd: dict[str, dict[str, str]]) -> None:
    """Ask for unknown models of a namespace with 32,000 routes -> as fast as in an empty table."""
    parts = Parts()
    parts.update(crowd)
    began = time.process_time()
    for at in range(10_000):
        assert parts.table.find(f"team-b/none-{at}") is None
    assert time.process_time() - began < 0.5


def test_routes_without_end() -> None:
    """Give one deployment 10,000 routes, or claim others' names by the thousand -> refused, with one line each."""
    parts = Parts()
    parts.update({"good": routes(1, count=2)})
    assert not parts.update({"good": routes(1, count=10_000)})
    assert parts.table.size == 2 and len(parts.problems) == 1
    theirs = Routes.read(routes(2)[ROUTES_KEY]).model_copy(update={"namespace": "team-c"})
    parts.update({"good": routes(1, count=2), "evil": {ROUTES_KEY: theirs.json_text()}})
    assert parts.table.size == 2 and len(parts.problems) == 1 and "127 more" in parts.problems[0]
    copies = {f"copy-{at}": {ROUTES_KEY: routes(1)[ROUTES_KEY].replace('"d1"', f'"e{at}"')} for at in range(20)}
    parts.update({"good": routes(1), **copies})
    assert parts.table.size == ROUTES and len(parts.problems) == 20


async def test_time_series_of_many_models() -> None:
    """Ask for each of thousands of models, and replace them -> a bounded number of time series, others keep theirs."""
    async with world() as made:
        theirs = [f"team-b/m{at}" for at in range(1500)]
        metrics = made.gateway.metrics
        for name in theirs:
            metrics.requests.labels(metrics.label(name), "200").inc()
        assert metrics.label("team-b/last") == "team-b/*" and metrics.label(MODEL) == MODEL
        assert len(metrics.text().splitlines()) < 1000
        for at in range(20):  # each change of the table forgets some of those that do not exist
            made.update(table(*made.addresses, idle_seconds=None, unavailable=f"{at}"))
        assert b"team-b/m1" not in metrics.text() and metrics.label("team-b/new") == "team-b/new"
