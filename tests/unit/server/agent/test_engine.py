"""How the agent handles engines: their answers, both forms of errors, and engines that hang, crash and restart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from graft_server.agent.engine import client as engine_module
from graft_server.agent.engine.client import EngineClient, EngineDown, EngineRefused, EngineSlow
from worlds.agent import Pod, serving
from worlds.serving import FakeEngine, eventually, listening


async def told(pod: Pod, adapter: object, reason: str) -> None:
    await eventually(lambda: (one := pod.one(adapter)) and one.reason == reason)  # type: ignore[arg-type]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("status", "message", "reason", "state"),
    [
        (500, "LoRA rank 8 is greater than max_lora_rank 4.", "EngineRejected", "Failed"),
        (400, "LoRA rank 8 is greater than max_lora_rank 4.", "EngineRejected", "Failed"),  # from older engines
        (500, "expected target modules in {'q_proj'} but received ['gate']", "EngineRejected", "Failed"),
        (404, "Loading lora x failed: No adapter found for /adapters/x", "EngineRejected", "Failed"),
        (400, "The lora adapter 'x' has already been loaded.", "EngineRejected", "Failed"),  # but it is not listed
        (503, "the engine is starting", "EngineUnavailable", "Loading"),
        (429, "too many requests", "EngineUnavailable", "Loading"),
    ],
)
async def test_a_refused_load_is_reported_with_the_message_of_the_engine(
    tmp_path: Path, flat: bool, status: int, message: str, reason: str, state: str
) -> None:
    async with serving(tmp_path) as (pod, _, _):
        pod.engine.flat_errors = flat
        bad, good = pod.store.publish("bad"), pod.store.publish("good")
        pod.engine.refuse[bad.engine_name] = (status, message)
        pod.want(bad, good)
        await told(pod, bad, reason)
        one = await pod.state(bad, state)
        assert message in str(one.message)
        await pod.state(good, "Loaded")
        pod.engine.refuse.clear()
        pod.want(bad, good, drain_seconds=1)
        assert (await pod.state(bad, "Loaded")).reason is None


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("status", [404, 400])  # older engines answer 400
async def test_an_unload_accepts_an_unknown_name_and_raises_other_errors(flat: bool, status: int) -> None:
    engine = FakeEngine()
    engine.flat_errors, engine.unknown_status = flat, status
    engine.adapters = {"x": "/adapters/x", "y": "/adapters/y"}
    engine.keep = {"y"}
    async with listening(engine.app()) as address, aiohttp.ClientSession() as session:
        client = EngineClient(session, f"http://{address}")
        await client.unload("x")
        assert engine.adapters == {"y": "/adapters/y"}
        await client.unload("x")  # the answer to the first unload may have been lost
        with pytest.raises(EngineRefused, match="unload failed"):
            await client.unload("y")


async def test_a_failed_unload_is_reported_and_retried(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a, b)
        await pod.ready()
        pod.engine.keep.add(a.engine_name)
        pod.want(b)
        await told(pod, a, "EngineRejected")
        assert pod.one(a).state == "Draining" and "unload failed" in str(pod.one(a).message)  # type: ignore[union-attr]
        assert (pod.dir / a.engine_name).exists() and await pod.agent.not_ready() is None
        pod.engine.keep.clear()
        pod.want(b, drain_seconds=1)  # a changed assignment ends the backoff
        await eventually(lambda: pod.one(a) is None)


async def test_a_load_that_hangs_does_not_block_other_adapters(tmp_path: Path) -> None:
    async with serving(tmp_path, load_seconds=0.5) as (pod, _, _):
        stuck, good = pod.store.publish("stuck"), pod.store.publish("good")
        pod.engine.hang.add(stuck.engine_name)
        pod.want(stuck, good)
        await pod.state(good, "Loaded")
        await told(pod, stuck, "EngineTimeout")
        assert "waiting for adapters: stuck-1.0.0" in str(await pod.ready(False))
        pod.engine.hang.clear()
        await pod.state(stuck, "Loaded")
        await pod.ready()


async def test_retries_of_failed_adapters_do_not_block_a_new_one(tmp_path: Path) -> None:
    async with serving(tmp_path, load_seconds=2.0) as (pod, _, _):
        stuck = [pod.store.publish(f"stuck{number}") for number in range(4)]
        pod.engine.hang.update(adapter.engine_name for adapter in stuck)
        pod.want(*stuck)
        for adapter in stuck:
            await told(pod, adapter, "EngineTimeout")
        pod.want(*stuck, drain_seconds=1)  # all loads are retried at once and hang again
        await eventually(lambda: len(pod.engine.calls) > len(stuck))
        good = pod.store.publish("good")
        pod.want(*stuck, good)
        started = asyncio.get_running_loop().time()
        await pod.state(good, "Loaded")
        assert asyncio.get_running_loop().time() - started < 1.9


async def test_an_engine_that_crashes_during_a_load_does_not_fail_the_adapter(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.engine.refuse[a.engine_name] = (500, "CUDA error: an illegal memory access")
        pod.want()
        await pod.ready()
        pod.engine.healthy = False
        pod.want(a)
        pod.engine.healthy = True
        dies = pod.engine.error

        def error(status: int, message: str, *rest: str) -> web.Response:
            pod.engine.healthy = False
            return dies(status, message, *rest)

        pod.engine.error = error  # type: ignore[method-assign, assignment]
        await told(pod, a, "EngineUnavailable")
        assert "illegal memory access" in str(pod.one(a).message)  # type: ignore[union-attr]
        pod.engine.refuse.clear()
        pod.engine.healthy = True
        pod.engine.restart()
        await pod.state(a, "Loaded")


async def test_after_a_restart_the_engine_gets_refused_adapters_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.engine.refuse[b.engine_name] = (500, "modules_to_save is not supported")
        pod.want(a, b)
        await pod.state(b, "Failed")
        await pod.ready()
        pod.engine.refuse.clear()
        pod.engine.restart()
        await pod.state(b, "Loaded")  # at once, although the backoff was minutes
        await pod.ready()


async def test_an_engine_that_hangs_is_unready_and_keeps_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_TIMEOUT", aiohttp.ClientTimeout(total=0.2))
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a)
        await pod.ready()
        pod.engine.awake.clear()
        assert "does not answer" in str(await pod.ready(False))
        pod.want(a, b)
        await eventually(lambda: (pod.dir / b.engine_name).exists())  # downloaded while the engine hangs
        await eventually(lambda: not pod.told[-1].ready)
        pod.engine.awake.set()
        await pod.ready()
        await pod.state(b, "Loaded")
        assert pod.engine.calls == [f"load {a.engine_name}", f"load {b.engine_name}"]


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (404, {"detail": "Not Found"}, EngineRefused, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (405, {"detail": "Method Not Allowed"}, EngineRefused, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (401, {"error": "Unauthorized"}, EngineRefused, "Unauthorized"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, EngineRefused, "field required"),
        (502, "bad gateway", EngineDown, "bad gateway"),
        (None, None, EngineSlow, "has not answered within 0 s"),
    ],
)
async def test_answers_of_other_servers_and_missing_answers_are_explained(
    status: int | None, body: object, error: type[Exception], words: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        if status is None:
            await asyncio.Event().wait()
        return web.Response(status=status or 500, text=json.dumps(body))

    app = web.Application()
    app.router.add_post("/v1/load_lora_adapter", answer)
    async with listening(app) as address, aiohttp.ClientSession() as session:
        with pytest.raises(error, match=words):
            await EngineClient(session, f"http://{address}", load_seconds=0.3).load("x", "/adapters/x")
