"""Which pods of a Job are known when it has ended."""

from types import SimpleNamespace
from typing import Any

import pytest
from graft.reconcile.shared.jobs import pods_of

Object = dict[str, Any]
Objects = list[Object]


def pod(name: str, phase: str, at: str = "2026-01-01T00:00:00Z") -> Object:
    owner = {"kind": "Job", "name": "j", "uid": "uid-j", "controller": True}
    return {"metadata": {"name": name, "creationTimestamp": at, "ownerReferences": [owner]}, "status": {"phase": phase}}


class Cache:
    """Holds `known`. The API server has `live`. `asked`: how often it was asked."""

    def __init__(self, known: Objects, live: Objects) -> None:
        self.known, self.live, self.asked = known, live, 0

    async def list(self, *_: Any, **__: Any) -> Objects:
        return self.known

    async def fresh(self, *_: Any, **__: Any) -> Objects:
        self.asked += 1
        return self.live


async def found(cache: Cache, *conditions: str) -> list[str]:
    job = {
        "metadata": {"uid": "uid-j"},
        "status": {"conditions": [{"type": name, "status": "True"} for name in conditions]},
    }
    return [item["metadata"]["name"] for item in await pods_of(SimpleNamespace(cache=cache), "shop", "u", [job])]  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["Complete", "Failed"])
@pytest.mark.parametrize("known", [[], [pod("a", "Running")], [pod("a", "Failed"), pod("b", "Pending")]])
async def test_pods_are_read_anew_if_they_seem_to_run_after_their_job_has_ended(known: Objects, end: str) -> None:
    """The events of a Job and of its pods arrive in any order."""
    later = pod("b", "Succeeded", "2026-01-02T00:00:00Z")
    cache = Cache(known, [later, pod("a", "Failed")])
    assert await found(cache, end) == ["a", "b"] and cache.asked == 1


async def test_pods_are_not_read_anew_without_need() -> None:
    running = Cache([pod("a", "Running")], [])
    assert await found(running) == ["a"] == await found(running, "FailureTarget") and running.asked == 0
    over = Cache([pod("a", "Failed"), pod("b", "Succeeded")], [])
    assert await found(over, "Complete") == ["a", "b"] and over.asked == 0
