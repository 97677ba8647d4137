"""The agent of a pod that must serve only some of the adapters."""

from __future__ import annotations

from pathlib import Path

from graft.contracts.agent import WANTED_KEY, WantedAdapter
from worlds.agent import Pod, serving
from worlds.serving import eventually


def tell(pod: Pod, assigned: list[str] | None, *adapters: tuple[WantedAdapter, list[str] | None]) -> None:
    """Write the wanted adapters of all pods. The agent under test runs in pod-1."""
    items = [adapter.model_copy(update={"pods": pods}) for adapter, pods in adapters]
    wanted = pod.wanted.model_copy(update={"adapters": items, "assigned": assigned})
    pod.agent.want({"x": {WANTED_KEY: wanted.json_text()}})


async def test_a_pod_loads_only_its_own_adapters_and_is_ready_with_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        mine, both, theirs = pod.store.publish("mine"), pod.store.publish("both"), pod.store.publish("theirs")
        tell(pod, ["pod-1", "pod-2"], (mine, ["pod-1"]), (both, ["pod-1", "pod-2"]), (theirs, ["pod-2"]))
        await pod.state(mine, "Loaded")
        await pod.state(both, "Loaded")
        await pod.ready()
        assert sorted(pod.engine.adapters) == sorted([mine.engine_name, both.engine_name])
        assert pod.one(theirs) is None

        tell(pod, ["pod-1", "pod-2"], (mine, ["pod-1"]), (both, ["pod-2"]), (theirs, ["pod-1", "pod-2"]))
        await pod.state(theirs, "Loaded")
        await eventually(lambda: sorted(pod.engine.adapters) == sorted([mine.engine_name, theirs.engine_name]))
        await pod.ready()


async def test_a_pod_that_the_assignment_does_not_list_waits(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one")
        tell(pod, ["pod-2"], (one, ["pod-2"]))
        assert "waiting for the operator" in str(await pod.ready(False))
        tell(pod, ["pod-1", "pod-2"], (one, ["pod-2"]))  # pod-1 is assigned, but without an adapter
        await pod.ready()
        assert pod.engine.adapters == {} and pod.told[-1].adapters == []


async def test_a_pod_removed_from_the_assignment_keeps_its_adapters(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one")
        tell(pod, ["pod-1"], (one, ["pod-1"]))
        await pod.state(one, "Loaded")
        tell(pod, ["pod-2"], (one, ["pod-2"]))
        await pod.agent.tick()
        assert await pod.ready() is None and list(pod.engine.adapters) == [one.engine_name]


async def test_a_change_for_another_pod_does_not_interrupt_a_download(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one", size=64 << 10)
        pod.store.slow = 0.01
        tell(pod, ["pod-1", "pod-2"], (one, ["pod-1", "pod-2"]))
        await eventually(lambda: pod.store.starts)
        tell(pod, ["pod-1", "pod-3"], (one, ["pod-1", "pod-3"]))
        await pod.state(one, "Loaded")
        assert len([name for name, _ in pod.store.starts if name == "adapter_model.safetensors"]) == 1
