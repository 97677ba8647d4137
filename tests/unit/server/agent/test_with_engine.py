"""The agent, Graft's own engine and the gateway together: from a version in the store to the answer for a client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
from graft.contracts.agent import Wanted
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.mounts import CALLERS_FILE
from graft_server.agent.engine.access import Access
from graft_server.agent.server import application
from graft_server.gateway.app import Gateway
from graft_server.gateway.settings import Settings
from worlds.agent import Pod
from worlds.engine import BASE, expected, make_adapter, make_base, running
from worlds.serving import eventually, listening

PROMPT = {"prompt": "hello", "temperature": 0, "max_tokens": 12}


async def test_an_adapter_in_the_store_answers_the_requests_of_a_client(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "support", seed=1)
    big = make_adapter(base, tmp_path / "big", seed=2, r=32)
    async with running(base, max_lora_rank=8) as api, aiohttp.ClientSession() as session:
        address = f"{api.client.host}:{api.client.port}"
        pod = Pod(tmp_path / "adapters")
        pod.wanted = Wanted(base_model=BASE, max_lora_rank=64, drain_seconds=0)
        await pod.start(session, f"http://{address}", base_model_name=BASE)
        support, too_big = pod.publish(folder, "support", 4), pod.publish(big, "big", 32)
        pod.want(support, too_big)
        await pod.state(support, "Loaded")
        failed = await pod.state(too_big, "Failed")  # the engine enforces its own maximum rank
        assert failed.reason == "EngineRejected" and "rank" in str(failed.message)
        await pod.ready()

        gateway = Gateway(session, Settings(), lambda: 0.0)
        target = RouteTarget(engine_model=support.engine_name, adapter=support.adapter, version="1.0.0")
        part = Routes(
            namespace="team-a",
            deployment="dep",
            base_model=BASE,
            routes=[RouteEntry(model="team-a/support", targets=[target])],
            backends=[Backend(pod="pod-1", address=address, loaded=[BASE, support.engine_name])],
        )
        gateway.update({"routes": {ROUTES_KEY: part.json_text()}})
        async with listening(gateway.application()) as front:
            url = f"http://{front}/v1/completions"
            body: dict[str, Any] = {"model": "team-a/support", **PROMPT}
            async with session.post(url, json=body) as response:
                answer = await response.json()
            assert answer["model"] == "team-a/support" and answer["graft"]["adapter"] == "support-1.0.0"
            assert answer["choices"][0]["text"] == expected(base, folder, "hello", 12)

            async with session.post(url, json={**body, "stream": True}) as response:
                lines = [line async for line in response.content if line.startswith(b"data: {")]
            assert {json.loads(line[6:])["model"] for line in lines} == {"team-a/support"}

            # The adapter is removed while a request runs. The request completes before the adapter is unloaded.
            async with session.post(
                url, json={**body, "stream": True, "max_tokens": 200, "ignore_eos": True}
            ) as response:
                await response.content.readline()
                pod.want()
                await pod.state(support, "Draining")
                text = await response.read()
                assert text.rstrip().endswith(b"data: [DONE]") and b'"error"' not in text
            await eventually(lambda: pod.one(support) is None)
            async with session.post(url, json=body) as response:
                assert response.status == 503 and response.headers["Retry-After"]
        await pod.kill()
        await asyncio.sleep(0)


async def test_prometheus_reads_the_metrics_of_the_engine_from_the_agent(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    access = Access(tmp_path / "access")
    async with (
        running(base, callers=str(tmp_path / "access" / CALLERS_FILE)) as api,
        aiohttp.ClientSession() as session,
    ):
        pod = Pod(tmp_path / "adapters")
        pod.access = access
        await pod.start(session, f"http://{api.client.host}:{api.client.port}", base_model_name=BASE)
        pod.want()
        await pod.ready()
        async with listening(application(pod.agent, lambda: 0.0)) as address:
            async with session.get(f"http://{address}/engine/metrics") as response:
                assert response.status == 200 and "vllm:num_requests_running" in await response.text()
            asked: list[str] = []
            exposition = pod.agent._client.exposition

            async def counted() -> str:
                asked.append("x")
                return await exposition()

            pod.agent._client.exposition = counted  # type: ignore[method-assign]
            pod.agent._scraped_at = float("-inf")

            async def scrape() -> int:
                async with session.get(f"http://{address}/engine/metrics") as response:
                    return response.status

            assert set(await asyncio.gather(*(scrape() for _ in range(50)))) == {200}
            assert len(asked) <= 3  # a neighbour cannot make the agent ask its engine without end
        await pod.kill()
