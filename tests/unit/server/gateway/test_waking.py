"""Requests for a sleeping deployment.

The gateway holds them and reports them to the operator. It answers them when a pod is ready, or refuses them in time.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from graft.contracts.gateway import DEMAND_CONFIGMAP, Demand
from graft_server.configmaps import ConfigMaps
from graft_server.gateway import demand
from graft_server.gateway.demand import Reporter, Waiting
from graft_server.gateway.metrics import Metrics
from graft_server.gateway.settings import Settings
from graft_server.gateway.table import Model
from worlds.gateway import MODEL, refused, table, world
from worlds.serving import FakeKube, eventually, listening

ASLEEP = {"idle_seconds": 60, "unavailable": "it is asleep; a request wakes it"}


async def test_the_first_request_waits_until_a_pod_is_ready() -> None:
    async with world() as made:
        made.update(table(**ASLEEP))
        waiting = asyncio.create_task(made.post().__aenter__())
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 1.0'))
        assert await made.metric(
            'graft_gateway_deployment_in_flight{deployment="dep",deployment_namespace="team-a"} 1.0'
        )
        made.update(table(*made.addresses, **ASLEEP | {"unavailable": None}))
        response = await waiting
        assert response.status == 200 and (await response.json())["graft"]["deployment"] == "dep"
        response.close()
        assert await made.metric(f'graft_gateway_held{{model="{MODEL}"}} 0.0')
        assert await made.metric(
            'graft_gateway_deployment_in_flight{deployment="dep",deployment_namespace="team-a"} 0.0'
        )


async def test_a_request_that_is_held_too_long_gets_503_with_retry_after() -> None:
    async with world(hold_seconds=0.3) as made:
        made.update(table(**ASLEEP))
        began = time.monotonic()
        async with made.post() as response:
            error = await refused(response, 503, "model_unavailable")
            assert response.headers["Retry-After"] == "10"
        assert 0.25 < time.monotonic() - began < 5
        assert "no pod was ready within 0 s" in error["message"] and "asleep" in error["message"]


async def test_the_number_of_held_requests_is_limited() -> None:
    async with world(max_held=2) as made:
        made.update(table(**ASLEEP))
        held = [asyncio.create_task(made.post().__aenter__()) for _ in range(2)]
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 2.0'))
        async with made.post() as response:
            error = await refused(response, 503, "model_unavailable")
        assert "2 requests wait for it" in error["message"]
        made.update(table(*made.addresses, **ASLEEP))
        assert [(await task).status for task in held] == [200, 200]


async def test_a_request_for_a_deployment_that_never_sleeps_is_refused_at_once() -> None:
    async with world() as made:
        made.update(table(unavailable="its replicas are starting"))
        async with made.post() as response:
            await refused(response, 503, "model_unavailable")


async def test_held_requests_are_refused_if_the_deployment_is_stopped_or_deleted() -> None:
    async with world() as made:
        made.update(table(**ASLEEP))
        held = asyncio.create_task(made.post().__aenter__())
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 1.0'))
        made.update(table(unavailable="the deployment is scaled to zero"))
        error = await refused(await held, 503, "model_unavailable")
        assert "scaled to zero" in error["message"]

        made.update(table(**ASLEEP))
        held = asyncio.create_task(made.post().__aenter__())
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 1.0'))
        made.update()
        await refused(await held, 404, "model_not_found")


async def test_a_gateway_that_drains_refuses_held_requests() -> None:
    async with world() as made:
        made.update(table(**ASLEEP))
        held = asyncio.create_task(made.post().__aenter__())
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 1.0'))
        made.gateway.drain()
        await refused(await held, 503, "model_unavailable")


async def test_the_request_of_a_client_that_disconnects_is_not_held() -> None:
    async with world() as made:
        made.update(table(**ASLEEP))
        held = asyncio.create_task(made.post().__aenter__())
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 1.0'))
        held.cancel()
        await eventually(lambda: made.metric(f'graft_gateway_held{{model="{MODEL}"}} 0.0'))


async def test_the_model_list_shows_that_a_deployment_sleeps() -> None:
    async with world() as made:
        made.update(table(**ASLEEP))
        async with made.session.get(f"{made.url}/v1/models/{MODEL}") as response:
            card: dict[str, Any] = (await response.json())["graft"]
        assert (card["state"], card["reason"]) == ("asleep", ASLEEP["unavailable"])


def model(deployment: str = "dep", idle_seconds: int | None = 60) -> Model:
    return Model("team-a/support", "team-a", deployment, "base", (), (), None, idle_seconds=idle_seconds)


async def test_the_first_request_is_reported_at_once_and_later_ones_rarely() -> None:
    kube = FakeKube()
    kube.put(DEMAND_CONFIGMAP, {"team-b.other.gw-2": "{}"})
    waiting = Waiting(Settings(), Metrics())
    async with listening(kube.app()) as address:
        client = kube.client(address)
        reporter = asyncio.create_task(Reporter(ConfigMaps(client, "graft-system"), waiting, "gw-1").run())
        with waiting.counted(model()):
            waiting.news.set()
            await eventually(lambda: kube.patches)
        with waiting.counted(model("second")), waiting.counted(model("awake", None)):
            await eventually(lambda: len(kube.patches) == 2)
        for _ in range(50):
            with waiting.counted(model()):
                await asyncio.sleep(0)
        await asyncio.sleep(2.5 * demand.TICK_SECONDS)
        reporter.cancel()
        await client.close()
    assert len(kube.patches) == 2, "there is only one write for each deployment within the interval"
    data = kube.items[DEMAND_CONFIGMAP]["data"]
    assert set(data) == {"team-a.dep.gw-1", "team-a.second.gw-1", "team-b.other.gw-2"}
    told = Demand.model_validate_json(data["team-a.dep.gw-1"])
    assert (told.namespace, told.deployment) == ("team-a", "dep")
    managers = [item["manager"] for item in kube.patches]
    assert len(set(managers)) == 2, "an apply removes the fields that the same manager applied before"


async def test_a_report_that_could_not_be_written_is_retried(monkeypatch: Any) -> None:
    monkeypatch.setattr(demand, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(demand, "URGENT_SECONDS", 0.05)
    kube = FakeKube()
    waiting = Waiting(Settings(), Metrics())
    async with listening(kube.app()) as address:
        client = kube.client(address)
        reporter = asyncio.create_task(Reporter(ConfigMaps(client, "graft-system"), waiting, "gw-1").run())
        with waiting.counted(model()):
            waiting.news.set()
            await asyncio.sleep(0.3)
            assert not kube.patches and not reporter.done()  # the operator has not created the ConfigMap yet
            kube.put(DEMAND_CONFIGMAP, {})
            await eventually(lambda: kube.patches)
        reporter.cancel()
        await client.close()
    assert json.loads(kube.patches[0]["data"]["team-a.dep.gw-1"])["deployment"] == "dep"


async def test_a_deployment_removed_during_a_write_does_not_end_the_reporter() -> None:
    kube = FakeKube()
    kube.put(DEMAND_CONFIGMAP, {})
    waiting = Waiting(Settings(), Metrics())

    class TableChanges(ConfigMaps):
        async def apply_key(self, *args: Any, **kwargs: Any) -> None:
            await super().apply_key(*args, **kwargs)
            waiting.keep_only({("team-a", "dep"), ("team-a", "third")})

    async with listening(kube.app()) as address:
        client = kube.client(address)
        with waiting.counted(model()), waiting.counted(model("second")), waiting.counted(model("third")):
            waiting.news.set()
            reporter = asyncio.create_task(Reporter(TableChanges(client, "graft-system"), waiting, "gw-1").run())
            await eventually(lambda: reporter.done() or len(kube.patches) == 2)
            assert not reporter.done()
        reporter.cancel()
        await client.close()
    assert set(kube.items[DEMAND_CONFIGMAP]["data"]) == {"team-a.dep.gw-1", "team-a.third.gw-1"}


def test_a_deployment_with_a_running_request_is_not_idle() -> None:
    waiting = Waiting(Settings(), Metrics())
    with waiting.counted(model()):
        known = waiting.activity["team-a", "dep"]
        known.told, known.written = known.newest, time.monotonic() - 3600
        assert waiting.due() == [("team-a", "dep")]
    waiting.keep_only(set())
    assert waiting.due() == []
