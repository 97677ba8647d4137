"""The root keys of the gateways: made once, repaired, rotated, and known to engines only by their SHA-256."""

from __future__ import annotations

import logging
from base64 import b64decode, b64encode
from typing import Any

import pytest
from graft.contracts.agent import Wanted
from graft.contracts.enginekeys import GATEWAY_KEYS, SENDS_KEYS, deployment_key, fingerprint, root_keys
from graft.reconcile.adapterdeployment.callers import accepted, refresh
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import Context
from worlds.reconciling import SETTINGS, MemoryKube, MemoryStore, context

PLACE = ("Secret", SETTINGS.namespace, GATEWAY_KEYS)
STRICT = Wanted(base_model="b", max_lora_rank=8, gateway_keys=[])
OPEN = Wanted(base_model="b", max_lora_rank=8)


def gateway(name: str, phase: str = "Running", **annotations: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": SETTINGS.namespace, "labels": dict(SETTINGS.gateway_selector)}
    return {"kind": "Pod", "metadata": metadata | {"annotations": annotations}, "status": {"phase": phase}}


def world(*objects: dict[str, Any]) -> tuple[Context, MemoryKube]:
    kube = MemoryKube(*objects)
    return context(kube, MemoryStore()), kube


async def test_the_secret_is_made_once_and_made_again_with_the_same_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ctx, kube = world()
    assert await refresh(ctx) and not await refresh(ctx)
    (text,) = kube.objects[PLACE]["data"].values()
    assert len(b64decode(text)) >= 32
    del kube.objects[PLACE]
    assert not await refresh(ctx)
    assert list(kube.objects[PLACE]["data"].values()) == [text]
    assert b64decode(text).decode() not in caplog.text + repr(ctx)


async def test_a_second_key_is_accepted_beside_the_first_one() -> None:
    ctx, kube = world()
    await refresh(ctx)
    first = await accepted(ctx, "uid", STRICT)
    kube.objects[PLACE]["data"]["2999-01-01.key"] = b64encode(b"x" * 32).decode()
    assert await refresh(ctx)
    both = await accepted(ctx, "uid", STRICT)
    assert isinstance(first, list) and isinstance(both, list) and len(both) == 2
    assert set(first) < set(both) and both[1] == fingerprint(deployment_key(b"x" * 32, "uid"))
    other = await accepted(ctx, "uid-2", STRICT)
    assert isinstance(other, list) and not set(other) & set(both)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "0 entries"),
        ({"a": "!"}, "a is not valid base64"),
        ({"a": b64encode(b"short").decode()}, "a has 5 bytes"),
        ({"a": b64encode(b"x" * 2000).decode()}, "a has 2000 bytes"),
        ({str(at): b64encode(b"x" * 32).decode() for at in range(9)}, "9 entries"),
    ],
)
async def test_invalid_keys_make_new_pods_wait_and_change_no_running_ones(data: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        root_keys(data)
    secret = {"kind": "Secret", "metadata": {"namespace": PLACE[1], "name": PLACE[2]}, "data": data}
    ctx, kube = world(secret)
    assert not await refresh(ctx)
    trouble = await accepted(ctx, "uid", None)
    assert isinstance(trouble, Trouble) and trouble.reason == "GatewayKeysUnavailable" and words in trouble.message
    del kube.objects[PLACE]
    await refresh(ctx)
    before = await accepted(ctx, "uid", STRICT)
    kube.objects[PLACE]["data"] = data
    assert not await refresh(ctx)
    assert await accepted(ctx, "uid", STRICT) == before


async def test_engines_ask_for_no_key_while_a_gateway_that_sends_none_runs() -> None:
    new = gateway("new", **{SENDS_KEYS: "true"})
    ctx, kube = world(new, gateway("old"))
    await refresh(ctx)
    assert await accepted(ctx, "uid", None) is None
    assert await accepted(ctx, "uid", OPEN) is None
    assert isinstance(await accepted(ctx, "uid", STRICT), list)  # nobody opens an engine again by a pod with our labels
    kube.objects["Pod", PLACE[1], "old"]["status"]["phase"] = "Succeeded"
    assert isinstance(await accepted(ctx, "uid", OPEN), list)
    del kube.objects["Pod", PLACE[1], "old"], kube.objects["Pod", PLACE[1], "new"]
    assert isinstance(await accepted(ctx, "uid", None), list)  # a gateway that is not running yet will send its key
