"""The operator signs the versions that it verified, and the agents load only signed versions."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from graft.api.adapter import AdapterSignature
from graft.artifacts.manifest import Manifest
from graft.artifacts.signing import Keys, Statement, generate, key_id, read_keys, trusted_keys, verify
from graft.contracts.agent import TRUSTED_KEYS, WantedAdapter
from graft_server.agent.storage.objects import Storage
from testbed.controlplane import ControlPlane
from worlds.agent import serving
from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import ACCOUNT, SYSTEM, OperatorProcess
from worlds.cluster.tenant import Tenant
from worlds.serving import eventually, safetensors

SECRET = "graft-signing"


def published(api: Api) -> dict[str, bytes]:
    """Return the public keys as the agents read them: key id -> key."""
    found = api.get("ConfigMap", SYSTEM, TRUSTED_KEYS)
    return trusted_keys((found or {}).get("data") or {})


def secret_keys(api: Api) -> Keys:
    found = api.get("Secret", SYSTEM, SECRET)
    assert found is not None
    return read_keys({name: base64.b64decode(value) for name, value in found["data"].items()})


def patch_keys(api: Api, **entries: bytes | None) -> None:
    """Change entries of the Secret as an administrator does with kubectl. None removes an entry.

    An underscore in a name stands for a dot.
    """
    data = {
        name.replace("_", "."): base64.b64encode(value).decode() if value else None for name, value in entries.items()
    }
    api.patch("Secret", SYSTEM, SECRET, {"data": data})


def signature(tenant: Tenant, name: str) -> AdapterSignature | None:
    found = tenant.status("Adapter", name).get("signature")
    return AdapterSignature.model_validate(found) if found else None


def statement(tenant: Tenant, adapter: Object) -> Statement:
    spec = adapter["spec"]
    return Statement(tenant.name, spec["adapter"], spec["version"], spec["artifact"]["uri"], spec["artifact"]["digest"])


def until_signed_by(tenant: Tenant, name: str, key: str) -> AdapterSignature:
    tenant.wait(lambda: (found := signature(tenant, name)) and found.key_id == key, f"{name} is signed by {key}")
    found = signature(tenant, name)
    assert found is not None
    verify(found, statement(tenant, tenant.get("Adapter", name)), published(tenant.api))
    return found


def wanted(fleet: Fleet) -> WantedAdapter:
    (one,) = fleet.wanted().adapters
    return one


@pytest.fixture
def restored(api: Api) -> Iterator[None]:
    """Restore the Secret after the test."""
    before = api.get("Secret", SYSTEM, SECRET)
    assert before is not None
    yield
    after = api.get("Secret", SYSTEM, SECRET)
    if after is None:
        api.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": SYSTEM}})
    gone: dict[str, Any] = dict.fromkeys((after or {}).get("data") or {})
    api.patch("Secret", SYSTEM, SECRET, {"data": gone | before["data"]})


def test_an_adapter_is_signed_and_the_agents_get_the_signature(tenant: Tenant) -> None:
    name = tenant.trained("first")
    keys = secret_keys(tenant.api)
    found = until_signed_by(tenant, name, keys.key_id)
    adapter = tenant.get("Adapter", name)
    prefix = adapter["spec"]["artifact"]["uri"].removeprefix("s3://graft/")
    stored = json.loads(tenant.store.get(prefix + "manifest.sig.json"))
    assert (stored["keyId"], stored["value"]) == (found.key_id, found.value)
    assert Statement(**stored["statement"]) == statement(tenant, adapter)

    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])
    fleet.until_wanted(name)
    assert wanted(fleet).signature == found
    agent = tenant.get("Deployment", "chat")["spec"]["template"]["spec"]["initContainers"][-1]
    assert agent["command"][agent["command"].index("--trusted-keys") + 1] == f"{SYSTEM}/{TRUSTED_KEYS}"


def test_a_rejected_version_is_not_signed(tenant: Tenant) -> None:
    tenant.job("first")
    pod = tenant.running_pod("first")
    prefix = tenant.publish_as_trainer("first", pod, rejected=["exactMatch 0.1 is below 0.5"])
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", "first", "Succeeded", "GateFailed")
    tenant.until("Adapter", "support-1.0.0", "Ready", "Rejected")
    assert signature(tenant, "support-1.0.0") is None
    assert not [item.key for item in tenant.store.objects(prefix) if item.key.endswith(".sig.json")]


def test_a_key_rotation_signs_again_without_reading_the_files(tenant: Tenant, restored: None) -> None:
    name = tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    pods = fleet.serve(["support@1.0.0"])
    old = secret_keys(tenant.api).key_id
    verified = tenant.status("Adapter", name)["verifiedAt"]
    template = tenant.get("Deployment", "chat")["metadata"]["generation"]
    # The operator would find this change only if it verified the files again.
    prefix = tenant.get("Adapter", name)["spec"]["artifact"]["uri"].removeprefix("s3://graft/")
    tenant.store.put(prefix + "adapter_model.safetensors", b"tampered")

    pem = generate()
    new = read_keys({"a.key": pem}).key_id
    patch_keys(tenant.api, **{"9999-01-01_key": pem})
    found = until_signed_by(tenant, name, new)
    assert set(published(tenant.api)) == {old, new}
    tenant.wait(lambda: wanted(fleet).signature == found, "the agents get the new signature")
    assert json.loads(tenant.store.get(prefix + "manifest.sig.json"))["keyId"] == new
    assert tenant.status("Adapter", name)["verifiedAt"] == verified
    assert tenant.condition("Adapter", name, "Ready")["reason"] == "Verified"
    assert tenant.get("Deployment", "chat")["metadata"]["generation"] == template
    assert [pod["metadata"]["uid"] for pod in fleet.pods(1)] == [pod["metadata"]["uid"] for pod in pods]

    # Removing the old key changes nothing else.
    (entry,) = [item for item in (tenant.api.get("Secret", SYSTEM, SECRET) or {})["data"] if item != "9999-01-01.key"]
    patch_keys(tenant.api, **{entry.replace(".", "_"): None})
    tenant.wait(lambda: set(published(tenant.api)) == {new}, "the old key is no longer trusted")
    assert signature(tenant, name) == found


def test_replacing_a_stolen_key_verifies_the_files_before_signing_again(tenant: Tenant, restored: None) -> None:
    """The replaced key signed both versions. The files of one version were changed since then."""
    whole, changed = tenant.trained("first"), tenant.trained("second", adapter="sales")
    prefix = tenant.get("Adapter", changed)["spec"]["artifact"]["uri"].removeprefix("s3://graft/")
    tenant.store.put(prefix + "adapter_model.safetensors", b"tampered")
    pem = generate()
    entries = (tenant.api.get("Secret", SYSTEM, SECRET) or {})["data"]
    patch_keys(tenant.api, **{"9999-02-01_key": pem}, **{item.replace(".", "_"): None for item in entries})
    until_signed_by(tenant, whole, read_keys({"a.key": pem}).key_id)
    tenant.until("Adapter", changed, "Ready", "DigestMismatch")
    assert signature(tenant, changed) is None


def test_a_forged_signature_in_the_status_is_replaced(tenant: Tenant) -> None:
    name = tenant.trained("first")
    found = until_signed_by(tenant, name, secret_keys(tenant.api).key_id)
    path = f"/apis/graft.dev/v1alpha1/namespaces/{tenant.name}/adapters/{name}/status"
    forged = {"status": {"signature": {"keyId": found.key_id, "value": "A" * 86 + "=="}}}
    tenant.api.call("PATCH", path, forged, "application/merge-patch+json")
    tenant.wait(lambda: signature(tenant, name) == found, "the operator wrote the correct signature again")


def test_a_deleted_signing_secret_is_replaced_by_a_new_key(tenant: Tenant, restored: None) -> None:
    name = tenant.trained("first")
    old = secret_keys(tenant.api).key_id
    tenant.api.delete("Secret", SYSTEM, SECRET)
    tenant.wait(lambda: tenant.api.get("Secret", SYSTEM, SECRET), "the operator created a new key")
    new = secret_keys(tenant.api).key_id
    assert new != old
    until_signed_by(tenant, name, new)
    tenant.wait(lambda: set(published(tenant.api)) == {new}, "the old key is no longer trusted")


def test_an_invalid_key_leaves_the_last_valid_keys_in_use(tenant: Tenant, restored: None) -> None:
    name = tenant.trained("first")
    before = published(tenant.api)
    patch_keys(tenant.api, **{"9999-03-01_key": b"SECRETWORD"})
    running = tenant.trained("second")  # signed with the keys of the last valid read
    assert published(tenant.api) == before
    assert {signature(tenant, item).key_id for item in (name, running)} <= set(before)  # type: ignore[union-attr]


def test_without_a_valid_key_an_adapter_names_the_invalid_entry_and_waits(
    tenant: Tenant, running: OperatorProcess, restored: None
) -> None:
    running.stop()
    entries = (tenant.api.get("Secret", SYSTEM, SECRET) or {})["data"]
    hidden: dict[str, bytes | None] = {item.replace(".", "_"): None for item in entries}
    patch_keys(tenant.api, **hidden, **{"1_key": b"SECRETWORD"})
    running.start()
    tenant.job("first")
    pod = tenant.running_pod("first")
    tenant.publish_as_trainer("first", pod)
    tenant.end_pod(pod)
    tenant.wait(lambda: tenant.api.get("Adapter", tenant.name, "support-1.0.0"), "the Adapter exists")
    told = tenant.until("Adapter", "support-1.0.0", "Ready", "SigningKeyUnavailable")
    assert told["status"] == "Unknown" and f"{SYSTEM}/{SECRET}" in told["message"] and "1.key" in told["message"]
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"])
    tenant.wait(
        lambda: fleet.expected_names() == ["support-1.0.0"],
        "the agents expect support-1.0.0",
        explain=lambda: str(fleet.status()),
    )
    assert fleet.wanted_names() == []
    patch_keys(tenant.api, **{"1_key": generate()})
    tenant.until("Adapter", "support-1.0.0", "Ready", "Verified")
    tenant.until("FineTuneJob", "first", "Succeeded", "Published")
    fleet.until_wanted("support-1.0.0")
    assert fleet.expected_names() == []
    log = running.log.read_text()
    assert "SECRETWORD" not in log and "PRIVATE KEY" not in log


def test_service_accounts_have_only_the_rights_to_the_keys_that_they_need(tenant: Tenant) -> None:
    tenant.trained("first")
    Fleet(tenant, "chat").serve(["support@1.0.0"])
    api = tenant.api
    operator, agent = (
        api.as_token(api.token(namespace, account))
        for namespace, account in ((SYSTEM, ACCOUNT), (tenant.name, "chat-agent"))
    )
    trainer = api.as_token(api.token(tenant.name, "default"))
    for one in (agent, trainer):
        assert published(one) == published(api)
        for kind, name in (("Secret", SECRET), ("ConfigMap", "graft-config")):
            refused(lambda kind=kind, name=name, one=one: one.get(kind, SYSTEM, name))  # type: ignore[misc]
        refused(lambda one=one: one.list("ConfigMap", SYSTEM))  # type: ignore[misc]
        forged = {"data": {"0" * 16: "x"}}
        refused(lambda one=one, forged=forged: one.patch("ConfigMap", SYSTEM, TRUSTED_KEYS, forged))  # type: ignore[misc]
    assert operator.get("Secret", SYSTEM, SECRET) is not None
    refused(lambda: operator.get("Secret", SYSTEM, "another"))
    refused(lambda: operator.patch("Secret", SYSTEM, SECRET, {"data": {}}))
    refused(lambda: operator.delete("Secret", SYSTEM, SECRET))


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(Refused) as error:
        call()
    assert error.value.status == 403


def test_a_public_key_that_was_added_by_hand_is_removed(tenant: Tenant) -> None:
    before = published(tenant.api)
    raw = b"x" * 32
    added = {"data": {key_id(raw): base64.b64encode(raw).decode()}}
    tenant.api.patch("ConfigMap", SYSTEM, TRUSTED_KEYS, added)
    tenant.wait(lambda: published(tenant.api) == before, "the operator removed the added key")
    tenant.api.delete("ConfigMap", SYSTEM, TRUSTED_KEYS)
    tenant.wait(lambda: published(tenant.api) == before, "the operator published the keys again")


async def test_the_agent_loads_only_versions_that_the_operator_signed(tenant: Tenant, tmp_path: Path) -> None:
    """Run the agent's own code with the namespace's key, the operator's ConfigMaps and a store that was tampered with."""
    secret = tmp_path / "secret"
    tenant.job("first")
    pod_name = tenant.running_pod("first")
    tenant.publish_as_trainer("first", pod_name, weights=safetensors("first"))
    tenant.end_pod(pod_name)
    tenant.until("FineTuneJob", "first", "Succeeded", "Published")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])
    fleet.until_wanted("support-1.0.0")
    real = wanted(fleet)
    secret.mkdir()
    for key, value in tenant.get("Secret", "graft-storage")["data"].items():
        (secret / key).write_bytes(base64.b64decode(value))
    found = tenant.api.get("ConfigMap", SYSTEM, TRUSTED_KEYS)
    assert found is not None
    async with serving(
        tmp_path, storage=Storage(secret), namespace=tenant.name, trusted={TRUSTED_KEYS: found["data"]}
    ) as (pod, _, _):
        # An attacker copies the version inside the tenant's own prefix and edits the wanted ConfigMap to name the copy.
        prefix = real.uri.removeprefix("s3://graft/")
        for item in list(tenant.store.objects(prefix)):
            tenant.store.copy(item.key, item.key.replace("/1.0.0/", "/6.6.6/"), item.size)
        elsewhere = real.model_copy(update={"uri": real.uri.replace("/1.0.0/", "/6.6.6/")})
        pod.want(elsewhere)
        assert (await pod.state(elsewhere, "Failed")).reason == "SignatureInvalid"
        pod.want(real)
        await pod.state(real, "Loaded")

        # The attacker changes the bytes of the signed version in the bucket.
        pod.want()
        await eventually(lambda: real.engine_name not in pod.engine.adapters)
        await pod.kill()
    (tmp_path / "second").mkdir()
    tenant.store.put(prefix + "adapter_model.safetensors", b"tampered")
    async with serving(
        tmp_path / "second", storage=Storage(secret), namespace=tenant.name, trusted={TRUSTED_KEYS: found["data"]}
    ) as (pod, _, _):
        pod.want(real)
        assert (await pod.state(real, "Failed")).reason == "DigestMismatch"
        assert pod.engine.calls == []


def test_an_auditor_verifies_a_version_with_a_public_key(tenant: Tenant, plane: ControlPlane, tmp_path: Path) -> None:
    name = tenant.trained("first")
    keys = secret_keys(tenant.api)
    until_signed_by(tenant, name, keys.key_id)

    def graft(*arguments: str | Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "graft.cli", *arguments, "-n", tenant.name]
        environment = os.environ | {"KUBECONFIG": str(plane.kubeconfig)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
        return done.returncode, done.stdout + done.stderr

    def graft_verify(private: Keys) -> tuple[int, str]:
        pem = private.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / "key.pub").write_bytes(pem)
        return graft("verify", name, "--key", tmp_path / "key.pub")

    code, text = graft_verify(keys)
    assert code == 0, text
    assert f"signed by {keys.key_id}" in text and "2 files" in text and "every SHA-256 verified" in text
    code, text = graft_verify(read_keys({"a.key": generate()}))
    assert code == 1 and "is NOT what was verified" in text and "not trusted" in text

    # Without a key, those that the operator publishes are trusted.
    code, text = graft("pull", name, "--to", tmp_path / "pulled", "-o", "json")
    assert code == 0, text
    assert json.loads(text)["keyId"] == keys.key_id
    manifest = tenant.store.get(
        tenant.get("Adapter", name)["spec"]["artifact"]["uri"].removeprefix("s3://graft/") + "manifest.json"
    )
    assert (tmp_path / "pulled/manifest.json").read_bytes() == manifest
    assert {file.name for file in Manifest.read(manifest).files} < {
        path.name for path in (tmp_path / "pulled").iterdir()
    }

    prefix = tenant.get("Adapter", name)["spec"]["artifact"]["uri"].removeprefix("s3://graft/")
    stored = tenant.store.get(prefix + "manifest.sig.json")
    for key, data, words in (
        ("adapter_model.safetensors", b"tampered", "adapter_model.safetensors has 8 bytes"),
        ("manifest.json", tenant.store.get(prefix + "manifest.json") + b" ", "does not match support 1.0.0"),
        ("manifest.sig.json", stored.replace(keys.key_id.encode(), b"0" * 16), "not trusted"),
        ("manifest.sig.json", b"{}", "manifest.sig.json is invalid"),
    ):
        before = tenant.store.get(prefix + key)
        tenant.store.put(prefix + key, data)
        code, text = graft_verify(keys)
        assert code == 1 and words in text, text
        tenant.store.put(prefix + key, before)
    tenant.store.delete(prefix + "manifest.sig.json")
    code, text = graft_verify(keys)
    assert code == 1 and "has a signature only after its Adapter is Ready" in text
