"""The agent beside an engine: the adapters that the pod serves in the end, and the reports of the agent."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from graft.contracts.agent import WANTED_KEY, AdapterState, Residency, ResidentAdapter, engine_name
from graft_server.agent.report.residency import Publisher
from graft_server.agent.server import application
from graft_server.agent.storage.fetchbase import fetch_base
from graft_server.configmaps import ConfigMaps, Follower
from worlds.agent import Pod, serving
from worlds.serving import NAMESPACE, FakeKube, eventually, listening, signed


async def test_adapters_are_downloaded_verified_loaded_and_reported(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        assert "has not read the wanted adapters" in str(await pod.ready(False))
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a, b)
        loaded = await pod.state(a, "Loaded")
        await pod.state(b, "Loaded")
        await pod.ready()
        assert loaded.load_seconds is not None and loaded.size_bytes
        folder = pod.dir / a.engine_name
        assert pod.engine.adapters[a.engine_name] == str(folder)
        assert "surprise" not in json.loads((folder / "adapter_config.json").read_text())
        assert not list(pod.dir.glob(".partial-*"))
        assert pod.told[-1].ready and pod.told[-1].engine_started


async def test_a_bad_adapter_fails_with_its_reason_and_blocks_no_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        good, flipped, high = (
            pod.store.publish("good"),
            pod.store.publish("flipped"),
            pod.store.publish("high", rank=64),
        )
        dora, other = pod.store.publish("dora", config={"use_dora": True}), pod.store.publish("other")
        absent = pod.store.publish("absent")
        del pod.store.objects[absent.uri.removeprefix("s3://bucket/") + "manifest.json"]
        key = flipped.uri.removeprefix("s3://bucket/") + "adapter_model.safetensors"
        pod.store.objects[key] = pod.store.objects[key][:-1] + b"\0"
        digest = "sha256:" + "0" * 64
        name = engine_name(NAMESPACE, other.adapter, digest)
        other = signed(other.model_copy(update={"digest": digest, "engine_name": name}))
        pod.want(flipped, high, dora, other, absent, good)
        await pod.state(good, "Loaded")
        for adapter, reason in (
            (flipped, "DigestMismatch"),
            (high, "RankTooHigh"),
            (dora, "ConfigInvalid"),
            (other, "DigestMismatch"),
            (absent, "FileMissing"),
        ):
            assert (await pod.state(adapter, "Failed")).reason == reason
        assert "sha256" in str(pod.one(flipped).message)  # type: ignore[union-attr]
        await pod.ready()  # readiness does not wait for permanent failures
        assert sorted(path.name for path in pod.dir.iterdir()) == [good.engine_name]

        pod.want(flipped, good)  # a changed assignment triggers a retry at once
        pod.store.publish("flipped")
        pod.want(flipped, good, drain_seconds=1)
        await pod.state(flipped, "Loaded")


@pytest.mark.parametrize("flat", [False, True])
async def test_a_refusal_is_reported_in_the_words_of_the_engine(tmp_path: Path, flat: bool) -> None:
    async with serving(tmp_path) as (pod, _, _):
        pod.engine.flat_errors = flat
        bad, good = pod.store.publish("bad"), pod.store.publish("good")
        pod.engine.refuse[bad.engine_name] = (500, "LoRA rank 8 is greater than max_lora_rank 4")
        pod.want(bad, good)
        failed = await pod.state(bad, "Failed")
        assert failed.reason == "EngineRejected" and "greater than max_lora_rank" in str(failed.message)
        await pod.state(good, "Loaded")
        await asyncio.sleep(0.3)
        assert pod.engine.calls.count(f"load {bad.engine_name}") == 1  # the backoff is long


async def test_an_unavailable_store_and_a_broken_download_are_retried(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.store.unavailable.add(a.uri.removeprefix("s3://bucket/") + "manifest.json")
        pod.store.cut.add(b.uri.removeprefix("s3://bucket/") + "adapter_model.safetensors")
        pod.want(a, b)
        for adapter in (a, b):
            await eventually(lambda adapter=adapter: (one := pod.one(adapter)) and one.reason == "StorageUnavailable")
            assert pod.one(adapter).state == "Pending"  # type: ignore[union-attr]
        assert "waiting for adapters" in str(await pod.ready(False))
        pod.store.unavailable.clear()
        pod.store.cut.clear()
        await pod.state(a, "Loaded")
        await pod.state(b, "Loaded")
        await pod.ready()


async def test_a_lost_answer_is_not_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.engine.forget_answer.add(a.engine_name)
        pod.want(a)
        assert (await pod.state(a, "Loaded")).reason is None


async def test_an_adapter_loaded_from_another_path_is_replaced(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.engine.adapters[a.engine_name] = "/somewhere/else"
        pod.want(a)
        await pod.state(a, "Loaded")
        assert pod.engine.adapters[a.engine_name] == str(pod.dir / a.engine_name)


async def test_a_restarted_engine_is_unready_until_it_has_all_adapters_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await pod.ready()
        first = pod.told[-1].engine_started
        pod.engine.refuse[a.engine_name] = (503, "starting")  # the engine starts slowly
        pod.engine.restart()
        assert "waiting for adapters: a-1.0.0" in str(await pod.ready(False))
        await eventually(lambda: not pod.told[-1].ready and pod.told[-1].engine_started != first)
        reads = len(pod.store.reads)
        pod.engine.refuse.clear()
        await pod.ready()
        assert len(pod.store.reads) == reads  # read from the disk, not from the store


async def test_an_unhealthy_engine_is_unready(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        pod.want(pod.store.publish("a"))
        await pod.ready()
        pod.engine.healthy = False
        assert "does not answer" in str(await pod.ready(False))
        pod.engine.healthy = True
        await pod.ready()
        pod.engine.base = "another-model"
        assert "does not serve base" in str(await pod.ready(False))


async def test_an_adapter_that_is_added_later_leaves_the_pod_ready(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a)
        await pod.ready()
        pod.store.slow = 0.02
        pod.want(a, b)
        await pod.state(b, "Loading")
        assert await pod.agent.not_ready() is None and pod.told[-1].ready
        await pod.state(b, "Loaded")
        assert all(said.ready for said in pod.told if said.adapters and len(said.adapters) == 2)


async def test_draining_waits_for_running_requests_then_unloads(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a, b)
        await pod.ready()
        pod.engine.running = [a.engine_name]
        pod.want(b)
        await pod.state(a, "Draining")
        await asyncio.sleep(0.4)
        assert a.engine_name in pod.engine.adapters and (pod.dir / a.engine_name).exists()
        pod.engine.running = [b.engine_name]
        await eventually(lambda: a.engine_name not in pod.engine.adapters)
        await eventually(lambda: pod.one(a) is None)
        assert (pod.dir / a.engine_name).exists()  # kept for a quick rollback
        assert pod.engine.calls.count(f"unload {a.engine_name}") == 1
        assert await pod.agent.not_ready() is None


async def test_an_adapter_stays_loaded_until_it_has_been_idle_long_enough(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a, drain_seconds=3600)
        await pod.ready()
        pod.want()
        await pod.state(a, "Draining")
        await asyncio.sleep(0.3)
        assert a.engine_name in pod.engine.adapters
        pod.want(a)  # wanted again: no second load is needed
        await pod.state(a, "Loaded")
        assert pod.engine.calls == [f"load {a.engine_name}"]


async def test_an_unwanted_download_is_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.store.slow = 0.2
        pod.want(a)
        await eventually(lambda: list(pod.dir.glob(".partial-*")))
        pod.want()
        await eventually(lambda: not list(pod.dir.iterdir()), seconds=2)
        assert not pod.engine.calls


async def test_after_a_crash_the_agent_continues_with_the_files_on_disk(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, session, url):
        a, b, gone = pod.store.publish("a"), pod.store.publish("b"), pod.store.publish("gone")
        pod.want(a, gone)
        await pod.ready()
        await pod.kill()
        # The files of an agent that was killed while it downloaded b and an adapter that is not wanted any more. It was
        # also replacing one folder and deleting another.
        (pod.dir / f".partial-{b.engine_name}").mkdir()
        (pod.dir / f".partial-{b.engine_name}" / "adapter_model.safetensors").write_bytes(b"half")
        (pod.dir / f".partial-{gone.engine_name[:-1]}0").mkdir()
        (pod.dir / f".gone-{a.engine_name}").mkdir()
        (pod.dir / b.engine_name).mkdir()  # the folder has no digest, so it is incomplete
        reads = len(pod.store.reads)
        await pod.start(session, url)
        pod.want(a, b)
        await pod.state(b, "Loaded")
        complete = sorted(one.engine_name for one in (a, b, gone))
        await eventually(lambda: sorted(p.name for p in pod.dir.iterdir()) == complete)
        await eventually(lambda: sorted(pod.engine.adapters) == sorted([a.engine_name, b.engine_name]))
        assert not [key for key in pod.store.reads[reads:] if "/a/" in key]
        await pod.ready()


async def test_the_agent_waits_for_an_engine_that_starts_later(tmp_path: Path) -> None:
    pod = Pod(tmp_path / "adapters")
    async with aiohttp.ClientSession() as session:
        async with listening(pod.engine.app()) as address:
            pass
        await pod.start(session, f"http://{address}")
        a = pod.store.publish("a")
        pod.want(a)
        await eventually(lambda: (pod.dir / a.engine_name).exists())  # downloaded before the engine starts
        assert "does not answer" in str(await pod.ready(False))
        async with listening(pod.engine.app(), int(address.rpartition(":")[2])):
            await pod.ready()
        await eventually(lambda: not pod.told[-1].ready)
        await pod.kill()


async def test_the_probes_and_metrics_show_the_state_of_the_agent(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, session, _):
        bad = pod.store.publish("bad", rank=64)
        pod.want(pod.store.publish("a"), bad)
        await pod.state(bad, "Failed")
        await pod.ready()
        async with listening(application(pod.agent, lambda: 1.5)) as address:
            for path in ("/readyz", "/livez"):
                async with session.get(f"http://{address}{path}") as response:
                    assert response.status == 200
            async with session.get(f"http://{address}/metrics") as response:
                text = await response.text()
            assert 'graft_agent_failures_total{reason="RankTooHigh"} 1.0' in text
            assert 'graft_agent_adapter_resident{adapter="a-1.0.0"} 1.0' in text
            assert "graft_agent_wanted_age_seconds 1.5" in text
            assert 'graft_agent_adapter_load_seconds_count{stage="all"} 1.0' in text
            pod.engine.healthy = False
            async with session.get(f"http://{address}/readyz") as response:
                assert response.status in (200, 503)  # the answer may be half a second old
            await pod.ready(False)
            async with session.get(f"http://{address}/readyz") as response:
                assert response.status == 503 and "does not answer" in (await response.json())["reason"]


# ConfigMaps in the Kubernetes API


@asynccontextmanager
async def kubernetes() -> AsyncIterator[tuple[FakeKube, ConfigMaps]]:
    kube = FakeKube()
    async with listening(kube.app()) as address:
        client = kube.client(address)
        try:
            yield kube, ConfigMaps(client, "team-a")
        finally:
            await client.close()


@asynccontextmanager
async def following(configmaps: ConfigMaps, **options: Any) -> AsyncIterator[tuple[Follower, list[Any]]]:
    seen: list[Any] = []
    selector = {"fieldSelector": "metadata.name=x"}
    follower = Follower(configmaps, selector, seen.append, **{"backoff": (0.01, 0.05), **options})
    task = asyncio.create_task(follower.run())
    try:
        yield follower, seen
    finally:
        task.cancel()


async def test_a_follower_sees_every_change_of_a_configmap(tmp_path: Path) -> None:
    async with kubernetes() as (kube, configmaps), following(configmaps) as (follower, seen):
        await eventually(lambda: seen == [{}] and kube.watchers)
        kube.put("x", {"k": "1"})
        kube.put("other", {"k": "1"})
        await eventually(lambda: seen[-1] == {"x": {"k": "1"}})
        kube.put("x", {"k": "2"})
        await eventually(lambda: seen[-1] == {"x": {"k": "2"}})
        kube.delete("x")
        await eventually(lambda: seen[-1] == {})
        assert follower.age is not None and follower.age < 5 and kube.lists == 1


@pytest.mark.parametrize("how", ["refused", "event"])
async def test_status_410_leads_to_a_new_list(how: str) -> None:
    async with kubernetes() as (kube, configmaps), following(configmaps) as (_, seen):
        kube.expired_watches = 2 if how == "refused" else 0
        await eventually(lambda: kube.watchers)
        kube.put("x", {"k": "missed"}, silent=True)  # no event reports this change
        kube.end_watches(410)
        await eventually(lambda: seen[-1] == {"x": {"k": "missed"}})
        await eventually(lambda: kube.watchers)
        assert kube.lists < 8


async def test_a_change_without_an_event_is_noticed_later() -> None:
    async with kubernetes() as (kube, configmaps), following(configmaps, watch_seconds=1.2) as (_, seen):
        await eventually(lambda: kube.watchers)
        kube.put("x", {"k": "1"}, silent=True)
        await eventually(lambda: seen[-1] == {"x": {"k": "1"}}, seconds=5)


async def test_the_last_data_are_kept_while_the_api_is_unavailable() -> None:
    async with kubernetes() as (kube, configmaps), following(configmaps) as (follower, seen):
        kube.put("x", {"k": "1"})
        await eventually(lambda: seen and seen[-1] and kube.watchers)
        kube.down = True
        kube.end_watches()
        await eventually(lambda: follower.failures > 3)
        assert seen[-1] == {"x": {"k": "1"}}
        kube.put("x", {"k": "2"})
        kube.down = False
        await eventually(lambda: seen[-1] == {"x": {"k": "2"}})


async def test_watches_that_end_at_once_are_retried_with_a_backoff() -> None:
    async with kubernetes() as (kube, configmaps), following(configmaps, backoff=(0.1, 0.2)):
        for _ in range(60):
            kube.end_watches()
            await asyncio.sleep(0.01)
        assert kube.lists < 15


async def test_residency_is_written_to_one_key_and_only_when_it_changes() -> None:
    async with kubernetes() as (kube, configmaps):
        publisher = Publisher(configmaps, "dep-residency", "pod-1", backoff=(0.01, 0.05))
        task = asyncio.create_task(publisher.run())
        residency = Residency(pod="pod-1", pod_uid="u", ready=False)
        publisher.publish(residency)
        await asyncio.sleep(0.1)
        assert not kube.patches  # only the operator creates the ConfigMap
        kube.put("dep-residency", {"pod-2": "theirs"})
        await eventually(lambda: kube.patches)
        for _ in range(5):
            publisher.publish(residency)
        await asyncio.sleep(0.1)
        assert kube.patches == [{"manager": "graft-agent-pod-1", "data": {"pod-1": residency.json_text()}}]
        publisher.publish(residency.model_copy(update={"ready": True}))
        await eventually(lambda: len(kube.patches) == 2)
        assert kube.items["dep-residency"]["data"]["pod-2"] == "theirs"
        task.cancel()


async def test_a_short_intermediate_state_is_not_written() -> None:
    async with kubernetes() as (kube, configmaps):
        kube.put("dep-residency", {})
        publisher = Publisher(configmaps, "dep-residency", "pod-1")
        task = asyncio.create_task(publisher.run())

        def tell(state: AdapterState) -> str:
            one = ResidentAdapter(engine_name="t--a--0", adapter="a", digest="d", state=state)
            residency = Residency(pod="pod-1", pod_uid="u", ready=True, adapters=[one])
            publisher.publish(residency)
            return residency.json_text()

        def written() -> list[str]:
            return [patch["data"]["pod-1"] for patch in kube.patches]

        first = tell("Pending")
        await eventually(lambda: written() == [first])
        tell("Loading")
        await asyncio.sleep(0.05)
        second = tell("Loaded")
        await eventually(lambda: written() == [first, second])
        third = tell("Pending")
        await eventually(lambda: written() == [first, second, third])
        fourth = tell("Loading")  # written late, but not lost
        await eventually(lambda: written() == [first, second, third, fourth])
        task.cancel()


async def test_the_wanted_adapters_are_kept_if_the_configmap_is_missing_or_invalid(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await pod.ready()
        pod.agent.want({})
        pod.agent.want({"x": {WANTED_KEY: "{"}})
        pod.agent.want({"x": {}})
        await asyncio.sleep(0.2)
        assert a.engine_name in pod.engine.adapters and await pod.agent.not_ready() is None


# The base model


def test_fetch_base_explains_why_it_cannot_read_the_base_model(tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    common = ["--target", str(tmp_path / "base"), "--termination-log", str(log), "--pvc-dir", str(tmp_path)]
    (tmp_path / "claim" / "model").mkdir(parents=True)
    assert fetch_base(["--uri", "pvc://claim/model", *common]) == 12
    said = json.loads(log.read_text())
    assert said["reason"] == "BaseModelUnavailable" and "config.json" in said["message"] and said["remedy"]
    (tmp_path / "claim" / "model" / "config.json").write_text("{}")
    assert fetch_base(["--uri", "pvc://claim/model", *common]) == 0
    assert fetch_base(["--uri", "s3://b/k", *common, "--storage-dir", str(tmp_path)]) == 17


def test_the_init_container_exits_on_sigterm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        told = {"endpoint": endpoint, "bucket": "b", "access-key-id": "i", "secret-access-key": "s"}
        for name, value in told.items():
            (tmp_path / name).write_text(value)
        options = ["--uri", "s3://b/k", "--target", str(tmp_path / "model"), "--storage-dir", str(tmp_path)]
        process = subprocess.Popen([sys.executable, "-m", "graft_server.agent", "fetch-base", *options])
        try:
            connection, _ = silent.accept()
            process.terminate()
            # The process must handle SIGTERM: the first process of a container ignores signals without a handler.
            assert process.wait(10) == 128 + signal.SIGTERM
            connection.close()
        finally:
            process.kill()
            process.wait()
