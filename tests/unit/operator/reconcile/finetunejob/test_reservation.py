"""The reservation of a version, when the last write of a former leader arrives late."""

from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.contracts.message import BaseModelRef
from graft.kube import KubeError
from graft.reconcile.finetunejob.reservation import reserve_version
from worlds.reconciling import MemoryKube, MemoryStore, context

BASE = BaseModelRef(name="tiny", uri="hf://tiny/base")


def job(name: str, version: str | None = None) -> dict[str, Any]:
    """A FineTuneJob that may have reserved a version."""
    reserved = {"version": version, "recipe": name, "baseModelUri": BASE.uri, "baseModelDigest": BASE.uri}
    return {
        "apiVersion": "graft.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1, "resourceVersion": "7"},
        "spec": {
            "baseModel": "tiny",
            "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
            "output": {"adapter": "support"},
            "method": {"lora": {}},
        },
        "status": {"resolved": reserved} if version else {},
    }


async def reserve(raw: dict[str, Any], *others: dict[str, Any]) -> Any:
    ctx = context(MemoryKube(raw, *others), MemoryStore())
    ctx.elected = True
    return await reserve_version(ctx, raw, FineTuneJob.model_validate(raw), BASE, None)


async def test_a_version_that_a_former_leader_reserved_twice_is_used_once() -> None:
    first, second = job("first", "1.0.0"), job("second", "1.0.0")
    found = await reserve(first, second)
    assert found != "1.0.0" and first["status"]["resolved"]["version"] == found
    assert await reserve(second, first) == "1.0.0"


async def test_a_late_reservation_does_not_replace_a_newer_status() -> None:
    read = job("first")
    live = job("first", "1.2.0")
    live["metadata"]["resourceVersion"] = "8"  # the new leader has reserved a version for the same job
    ctx = context(MemoryKube(live), MemoryStore())
    ctx.elected = True
    with pytest.raises(KubeError) as raised:
        await reserve_version(ctx, read, FineTuneJob.model_validate(read), BASE, None)
    assert raised.value.status == 409 and live["status"]["resolved"]["version"] == "1.2.0"
