"""A tenant who makes the operator act for them with rights that they do not have."""

import asyncio
import json
from typing import Any

import pytest
from graft.reconcile.adapter.adapter import reconcile
from worlds.reconciling import MemoryKube, MemoryStore, adapter, context, publish, ready

DIGEST = "sha256:" + "0" * 64
FOREIGN = [
    "s3://other-bucket/shop/adapters/support/1.0.0/",
    "s3://graft/rival/adapters/support/1.0.0/",
    "s3://graft/shop/../rival/adapters/support/1.0.0/",
    "s3://graft/shopping/adapters/support/1.0.0/",
    "s3://graft/models/secret/",
]


async def until_settled(ctx: Any, name: str = "support", namespace: str = "shop") -> None:
    """Reconcile an Adapter until no verification of it waits or runs."""
    for _ in range(200):
        await reconcile(ctx, namespace, f"{name}-1.0.0")
        if ctx.transfers.find(f"uid-{namespace}-{name}") is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the verification does not end")


@pytest.mark.parametrize("uri", FOREIGN)
async def test_a_foreign_artifact_is_refused_without_a_request(uri: str) -> None:
    """An Adapter names files that its namespace's key cannot read -> OutsideNamespace, and the store is not asked."""
    store, raw = MemoryStore(), adapter(uri, DIGEST)
    kube = MemoryKube(raw)
    await reconcile(context(kube, store), "shop", "support-1.0.0")
    assert ready(raw)["reason"] == "OutsideNamespace" and store.requests == []
    assert "s3://graft/shop/" in ready(raw)["message"]


@pytest.mark.parametrize("uri", FOREIGN)
async def test_existing_and_missing_foreign_files_look_the_same(uri: str) -> None:
    """A tenant asks by Adapters which versions of others exist, and with which digest -> all answers are the same."""
    answers = []
    for exists, digest in ((False, DIGEST), (True, DIGEST), (True, "")):
        store = MemoryStore()
        real = publish(store, "rival/adapters/support/1.0.0/") if exists else DIGEST
        raw = adapter(uri, digest or real)
        kube = MemoryKube(raw)
        await reconcile(context(kube, store), "shop", "support-1.0.0")
        answers.append((ready(raw) | {"lastTransitionTime": ""}, kube.events, raw["status"].get("metrics")))
    assert answers[0] == answers[1] == answers[2]


async def test_what_an_older_operator_told_about_foreign_files_is_taken_back() -> None:
    """A foreign version was verified and signed before the upgrade -> it loses its signature, scores and size."""
    store = MemoryStore()
    conditions = [
        {
            "type": "Ready", "status": "True", "reason": "Verified", "message": "m", "observedGeneration": 1,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ]  # fmt: skip
    told = {"metrics": {"exactMatch": 0.7}, "sizeBytes": 7, "signature": {"keyId": "k", "value": "v"}, "score": "0.70"}
    raw = adapter(FOREIGN[0], DIGEST, conditions=conditions, **told)
    await reconcile(context(MemoryKube(raw), store), "shop", "support-1.0.0")
    assert ready(raw)["reason"] == "OutsideNamespace" and store.requests == []
    assert not set(told) & set(raw["status"])


@pytest.mark.parametrize(
    "uri", [*FOREIGN, "s3://graft/shop/adapters/support/", "s3://graft/shop/adapters/sales/1.0.0/"]
)
async def test_a_deleted_adapter_takes_no_foreign_files_along(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Adapter with deletionPolicy Delete names files of others -> its deletion deletes none of them."""
    raw, store = adapter(uri, DIGEST), MemoryStore()
    raw["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await reconcile(context(MemoryKube(raw), store), "shop", "support-1.0.0")
    assert raw["metadata"]["finalizers"] == [] and store.requests == []


async def test_a_digest_is_not_told_by_a_mismatch() -> None:
    """An Adapter guesses a digest -> the message tells neither the digest of the manifest nor of a file."""
    store = MemoryStore()
    digest = publish(store, "shop/adapters/support/1.0.0/")
    raw = adapter("s3://graft/shop/adapters/support/1.0.0/", DIGEST)
    kube = MemoryKube(raw)
    await until_settled(context(kube, store))
    assert ready(raw)["reason"] == "DigestMismatch"
    assert digest.removeprefix("sha256:") not in json.dumps([raw["status"], kube.events])
    raw = adapter("s3://graft/shop/adapters/support/1.0.0/", digest)
    store.objects_["shop/adapters/support/1.0.0/adapter_config.json"] = b"[]"
    await until_settled(context(MemoryKube(raw), store))
    assert ready(raw)["reason"] == "DigestMismatch" and "sha256" not in ready(raw)["message"].lower().replace(
        "sha-256", ""
    )


async def test_files_of_the_own_part_are_still_verified_and_signed() -> None:
    """No attack: a version in the namespace's own part becomes Ready and has a signature."""
    store = MemoryStore()
    raw = adapter("s3://graft/shop/adapters/support/1.0.0/", publish(store, "shop/adapters/support/1.0.0/"))
    await until_settled(context(MemoryKube(raw), store))
    assert ready(raw)["reason"] == "Verified" and raw["status"]["signature"]["value"]
