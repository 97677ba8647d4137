"""The agent and signatures: an adapter that the operator has not signed is never loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from graft.artifacts.signing import Keys, generate, published_keys, read_keys
from graft.contracts.agent import WantedAdapter
from graft_server.agent.settings import parse
from worlds.agent import serving
from worlds.serving import KEYS, TRUSTED, eventually, signed

FOREIGN = read_keys({"a.key": generate()})
NEW = read_keys({"b.key": generate()})


def trusting(*keys: Keys) -> dict[str, dict[str, str]]:
    """Return the ConfigMap with the public keys of `keys`."""
    return {"graft-trusted-keys": {name: text for one in keys for name, text in published_keys(one.public).items()}}


def changed(wanted: WantedAdapter, **fields: object) -> WantedAdapter:
    return wanted.model_copy(update=fields)


FORGERIES: dict[str, tuple[Callable[[WantedAdapter, WantedAdapter], WantedAdapter], str, str]] = {
    "none": (lambda bad, good: changed(bad, signature=None), "SignatureMissing", "Pending"),
    "by a foreign key": (lambda bad, good: signed(bad, FOREIGN), "SignatureKeyUnknown", "Pending"),
    "altered": (
        lambda bad, good: changed(bad, signature=bad.signature.model_copy(update={"value": "A" * 86 + "=="})),  # type: ignore[union-attr]
        "SignatureInvalid",
        "Failed",
    ),
    "a foreign one under our key's name": (
        lambda bad, good: changed(
            bad,
            signature=signed(bad, FOREIGN).signature.model_copy(update={"key_id": KEYS.key_id}),  # type: ignore[union-attr]
        ),
        "SignatureInvalid",
        "Failed",
    ),
    "of another adapter": (lambda bad, good: changed(bad, signature=good.signature), "SignatureInvalid", "Failed"),
    "of another version": (lambda bad, good: signed(bad, version="1.0.1"), "SignatureInvalid", "Failed"),
    "of another namespace": (lambda bad, good: signed(bad, namespace="team-b"), "SignatureInvalid", "Failed"),
    "of another place": (lambda bad, good: signed(bad, uri="s3://bucket/team-b/"), "SignatureInvalid", "Failed"),
    "of other files": (lambda bad, good: signed(bad, digest=good.digest), "SignatureInvalid", "Failed"),
    "another version's files under this name": (
        lambda bad, good: changed(good, engine_name=bad.engine_name),
        "SignatureInvalid",
        "Failed",
    ),
}


async def test_an_expected_adapter_is_downloaded_before_it_is_signed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        good, early = pod.store.publish("good"), pod.store.publish("early")
        pod.want(good, expected=[changed(early, signature=None)])
        await pod.state(good, "Loaded")
        await eventually(lambda: early.engine_name in [path.name for path in pod.dir.iterdir()])
        await pod.ready()
        assert pod.one(early) is None and early.engine_name not in pod.engine.adapters
        read = len(pod.store.reads)
        pod.want(good, changed(early, signature=None), expected=[])
        assert (await pod.state(early, "Loading")).reason in {None, "SignatureMissing"}
        await eventually(lambda: (item := pod.one(early)) is not None and item.reason == "SignatureMissing")
        assert early.engine_name not in pod.engine.adapters
        pod.want(good, early)
        await pod.state(early, "Loaded")
        assert len(pod.store.reads) == read, "no file is read from the store again"


@pytest.mark.parametrize(
    "where",
    [
        "s3://bucket/team-b/adapters/early/1.0.0/",
        "s3://bucket/team-ab/adapters/early/1.0.0/",
        "s3://bucket/",
        "s3://other/team-a/adapters/early/1.0.0/",
    ],
)
async def test_an_expected_adapter_outside_the_prefix_of_the_tenant_is_not_read(tmp_path: Path, where: str) -> None:
    async with serving(tmp_path) as (pod, _, _):
        good, early, third = (pod.store.publish(name) for name in ("good", "early", "third"))
        foreign = changed(early, signature=None, uri=where)
        named = changed(early, signature=None, engine_name=good.engine_name.replace("good", "other"))
        pod.want(good, expected=[foreign, named, changed(third, signature=None)])
        await pod.state(good, "Loaded")
        await eventually(lambda: third.engine_name in [path.name for path in pod.dir.iterdir()])
        assert not [key for key in pod.store.reads if "early" in key]


async def test_a_version_whose_files_have_moved_is_inspected_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        good, early = pod.store.publish("good"), pod.store.publish("early")
        copy = early.uri.replace("/early/", "/copy/").removeprefix("s3://bucket/")
        pod.store.objects[copy + "manifest.json"] = pod.store.objects[
            early.uri.removeprefix("s3://bucket/") + "manifest.json"
        ]
        pod.want(good, expected=[changed(early, signature=None, uri=f"s3://bucket/{copy}")])
        await eventually(lambda: [key for key in pod.store.reads if key == copy + "adapter_config.json"])
        pod.want(good, early, expected=[])
        await pod.state(early, "Loaded")


async def test_a_failed_download_of_an_expected_adapter_is_not_reported_and_is_retried(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        good, early = pod.store.publish("good"), pod.store.publish("early")
        key = early.uri.removeprefix("s3://bucket/") + "adapter_model.safetensors"
        whole = pod.store.objects.pop(key)
        pod.want(good, expected=[changed(early, signature=None)])
        await pod.state(good, "Loaded")
        await eventually(lambda: pod.store.reads.count(key) > 0)
        await pod.ready()
        assert pod.one(early) is None
        pod.store.objects[key] = whole
        pod.want(good, early, expected=[])
        await pod.state(early, "Loaded")


@pytest.mark.parametrize("how", FORGERIES)
async def test_an_adapter_without_a_valid_signature_is_never_read_or_loaded(tmp_path: Path, how: str) -> None:
    forge, reason, state = FORGERIES[how]
    async with serving(tmp_path) as (pod, _, _):
        bad, good = pod.store.publish("bad"), pod.store.publish("good")
        pod.want(good)
        await pod.state(good, "Loaded")
        pod.store.reads.clear()
        forged = forge(bad, good)
        pod.want(forged, good)
        await eventually(lambda: (one := pod.one(forged)) and (one.reason, one.state) == (reason, state))
        await pod.ready()  # the pod was ready before and stays ready
        assert pod.store.reads == [] and pod.engine.calls == [f"load {good.engine_name}"]
        pod.want(bad, good)  # the operator has signed it correctly now
        await pod.state(bad, "Loaded")


async def test_the_agent_waits_for_the_trusted_keys(tmp_path: Path) -> None:
    async with serving(tmp_path, trusted=None) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await eventually(lambda: pod.engine.start_time and pod.told)
        assert "has not read the trusted keys" in str(await pod.ready(False))
        assert pod.store.reads == [] and pod.one(a).reason is None  # type: ignore[union-attr]
        pod.agent.trusted_keys(TRUSTED)
        await pod.state(a, "Loaded")


async def test_a_pod_without_trusted_keys_does_not_become_ready(tmp_path: Path) -> None:
    async with serving(tmp_path, trusted={}) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await eventually(lambda: (one := pod.one(a)) and one.reason == "SignatureKeyUnknown")
        assert "waiting for adapters" in str(await pod.ready(False))
        pod.agent.trusted_keys(TRUSTED)  # new keys end the backoff at once
        await pod.state(a, "Loaded")
        pod.agent.trusted_keys({})  # a missing ConfigMap does not revoke the keys
        b = pod.store.publish("b")
        pod.want(a, b)
        await pod.state(b, "Loaded")


async def test_a_key_rotation_reloads_no_adapter(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await pod.state(a, "Loaded")
        pod.agent.trusted_keys(trusting(KEYS, NEW))
        again = signed(a, NEW)
        pod.want(again)
        pod.agent.trusted_keys(trusting(NEW))
        b = signed(pod.store.publish("b"), NEW)
        pod.want(again, b)
        await pod.state(b, "Loaded")
        assert pod.engine.calls == [f"load {a.engine_name}", f"load {b.engine_name}"]

        pod.engine.restart()  # adapters that are loaded again are verified with the present keys
        await eventually(lambda: sorted(pod.engine.adapters) == sorted([a.engine_name, b.engine_name]))
        c = pod.store.publish("c")
        pod.want(again, b, c)
        await eventually(lambda: (one := pod.one(c)) and one.reason == "SignatureKeyUnknown")


async def test_a_new_signature_does_not_interrupt_a_download(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        pod.agent.trusted_keys(trusting(KEYS, NEW))
        pod.store.slow = 0.02
        a = pod.store.publish("a", size=1 << 16)
        pod.want(a)
        await pod.state(a, "Loading")
        pod.want(signed(a, NEW))
        await pod.state(a, "Loaded")
        assert 'graft_agent_downloads_total{result="abandoned"}' not in pod.agent.metrics.text().decode()
        assert [key for key, start in pod.store.starts].count("adapter_model.safetensors") == 1


async def test_files_that_only_a_retired_key_signed_are_not_loaded_again(tmp_path: Path) -> None:
    """A stolen key was removed. When the engine restarts, adapters that only this key signed are not loaded again."""
    async with serving(tmp_path) as (pod, _, _):
        a, b = pod.store.publish("a"), pod.store.publish("b")
        pod.want(a, b)
        await pod.state(a, "Loaded")
        await pod.state(b, "Loaded")
        pod.agent.trusted_keys(trusting(NEW))
        assert sorted(pod.engine.adapters) == sorted([a.engine_name, b.engine_name])  # loaded adapters stay
        pod.want(a, signed(b, NEW))
        pod.engine.restart()
        await eventually(lambda: (one := pod.one(a)) and one.reason == "SignatureKeyUnknown")
        # The state of b before the restart was Loaded, too.
        await eventually(lambda: list(pod.engine.adapters) == [b.engine_name])


async def test_validly_signed_files_that_were_tampered_with_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        key = a.uri.removeprefix("s3://bucket/") + "manifest.json"
        other = pod.store.publish("other")
        pod.store.objects[key] = pod.store.objects[other.uri.removeprefix("s3://bucket/") + "manifest.json"]
        pod.want(a)
        failed = await pod.state(a, "Failed")
        assert failed.reason == "DigestMismatch" and pod.engine.calls == []
        assert list(pod.dir.iterdir()) == []


def test_the_flag_for_trusted_keys_names_one_configmap() -> None:
    flags = [
        "--namespace",
        "n",
        "--wanted-configmap",
        "w",
        "--residency-configmap",
        "r",
        "--pod-name",
        "p",
        "--pod-uid",
        "u",
    ]
    assert parse(flags).trusted_keys is None
    assert parse([*flags, "--trusted-keys", "graft-system/graft-trusted-keys"]).trusted_keys == (
        "graft-system",
        "graft-trusted-keys",
    )
    for wrong in ("graft-trusted-keys", "graft-system/", "/graft-trusted-keys"):
        with pytest.raises(SystemExit):
            parse([*flags, "--trusted-keys", wrong])
