"""Writes that are sent at the same time."""

import asyncio
from typing import Any

import pytest
from graft.kube import Kube, KubeError


async def test_an_error_waits_for_the_other_writes() -> None:
    """A late write must not replace those of the next attempt."""
    ended: list[str] = []

    class Slow(Kube):
        async def apply(self, manifest: Any, **_: Any) -> Any:
            if manifest["metadata"]["name"] == "refused":
                raise KubeError(403, "Forbidden", "no")
            await asyncio.sleep(0.01)
            ended.append(manifest["metadata"]["name"])
            return manifest

    kube = Slow(object())
    with pytest.raises(KubeError):
        await kube.put(*({"metadata": {"name": name}} for name in ("refused", "late")))
    assert ended == ["late"]
