"""The agent of a pod that is to have a part of the adapters only."""

from __future__ import annotations

from pathlib import Path

from graft.contracts.agent import WANTED_KEY, WantedAdapter
from worlds.agent import Pod, serving
from worlds.serving import eventually


def tell(pod: Pod, assigned: list[str] | None, *adapters: tuple[WantedAdapter, list[str] | None]) -> None:
    """Write what is wanted for all pods; this one is pod-1."""
    items = [adapter.model_copy(update={"pods": pods}) for adapter, pods in adapters]
    wanted = pod.wanted.model_copy(update={"adapters": items, "assigned": assigned})
    pod.agent.want({"x": {WANTED_KEY: wanted.json_text()}})


async def test_a_pod_takes_its_own_part_and_is_ready_with_it(tmp_path: Path) -> None:
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


async def test_a_pod_that_the_assignment_does_not_know_waits_for_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one")
        tell(pod, ["pod-2"], (one, ["pod-2"]))
        assert "waiting for the operator" in str(await pod.ready(False))
        tell(pod, ["pod-1", "pod-2"], (one, ["pod-2"]))  # known, and there is no adapter for it
        await pod.ready()
        assert pod.engine.adapters == {} and pod.told[-1].adapters == []


async def test_a_pod_that_is_forgotten_goes_on_with_what_it_has(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one")
        tell(pod, ["pod-1"], (one, ["pod-1"]))
        await pod.state(one, "Loaded")
        tell(pod, ["pod-2"], (one, ["pod-2"]))
        await pod.agent.tick()
        assert await pod.ready() is None and list(pod.engine.adapters) == [one.engine_name]


async def test_another_pods_part_disturbs_no_download(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        one = pod.store.publish("one", size=64 << 10)
        pod.store.slow = 0.01
        tell(pod, ["pod-1", "pod-2"], (one, ["pod-1", "pod-2"]))
        await eventually(lambda: pod.store.starts)
        tell(pod, ["pod-1", "pod-3"], (one, ["pod-1", "pod-3"]))
        await pod.state(one, "Loaded")
        assert len([name for name, _ in pod.store.starts if name == "adapter_model.safetensors"]) == 1
