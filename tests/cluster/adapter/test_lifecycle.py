"""The life of published versions: compatibility with base models, deletion, compression and restore."""

import hashlib
import lzma
import random
import time
from typing import Any

import pytest
from graft.artifacts import archive
from graft.artifacts.versions import read_manifest, verify
from graft.kube import KINDS
from worlds.cluster.api import MERGE, Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.maker import Maker
from worlds.cluster.operator_process import BUCKET, OperatorProcess
from worlds.cluster.settled import settled
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import make_base_model


def base_model(tenant: Tenant, **spec: Any) -> str:
    """Create a BaseModel for one test only, so that the test may change its files. Return its name."""
    return make_base_model(tenant.api, tenant.store, f"base-{tenant.name}"[:60].strip("-"), **spec)


def change_files(tenant: Tenant, base: str, version: str) -> str:
    """Replace the model's files and give them a new version. Return the digest of the old files."""
    before = base_digest(tenant, base)
    tenant.store.put(f"models/{base}/model.safetensors", tenant.name.encode())
    tenant.api.patch("BaseModel", None, base, {"spec": {"version": version}})
    tenant.wait(lambda: base_digest(tenant, base) != before, "the operator detected the new files")
    return before


def base_digest(tenant: Tenant, base: str) -> str:
    found = tenant.api.get("BaseModel", None, base)
    assert found is not None
    return str(found.get("status", {}).get("digest"))


def prefix(tenant: Tenant, version: str) -> str:
    return f"{tenant.name}/adapters/support/{version}/"


def files(tenant: Tenant, version: str) -> list[str]:
    place = prefix(tenant, version)
    return sorted(item.key.removeprefix(place) for item in tenant.store.objects(place))


WHOLE = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "manifest.sig.json"]
ARCHIVED = ["adapter_config.json", "adapter_model.safetensors.xz", "manifest.json", "manifest.sig.json"]


def output(**more: Any) -> Object:
    return {"adapter": "support"} | more


# Compatibility with base models.


def test_pods_stay_on_the_old_base_model_until_an_adapter_fits_the_new_one(tenant: Tenant) -> None:
    base = base_model(tenant, version="1.0.0")
    tenant.trained("first", baseModel=base)
    fleet = Fleet(tenant, "chat")
    before = fleet.serve(["support@latest"], replicas=2, baseModel=base)

    def fitting(name: str) -> list[tuple[str, str]]:
        found = tenant.status("Adapter", name).get("compatibility", [])
        return [(item["name"], item["version"]) for item in found if item["name"] == base]

    tenant.wait(lambda: fitting("support-1.0.0") == [(base, "1.0.0")], "status.compatibility lists the BaseModel")
    old = change_files(tenant, base, "2.0.0")
    held = fleet.until("Accepted", "BaseModelHeld")
    assert old in held["message"] and "baseVersions" in held["message"] and "tune a version" in held["message"]
    tenant.wait(lambda: fitting("support-1.0.0") == [], "status.compatibility no longer lists the BaseModel")
    assert sorted(pod["metadata"]["uid"] for pod in fleet.pods(2)) == sorted(pod["metadata"]["uid"] for pod in before)
    assert fleet.targets() == {"support": "support-1.0.0"}
    assert fleet.until("Available", "Serving")["status"] == "True" and fleet.status()["stage"] == "Available"

    # A new deployment can use only the new files, and the adapter does not fit them.
    other = Fleet(tenant, "other")
    other.deploy(["support@1.0.0"], baseModel=base)
    refused = other.until("Accepted", "AdapterIncompatible")
    assert old in refused["message"] and base_digest(tenant, base) in refused["message"]

    # Once a version fits the new files, the pods roll.
    assert tenant.trained("second", baseModel=base) == "support-1.0.1"
    other.change(adapters=["support@^1"])
    other.until_wanted("support-1.0.1")
    fleet.until_wanted("support-1.0.0", "support-1.0.1")
    names = {pod["metadata"]["name"] for pod in before}

    def rolled() -> bool:
        now = [pod for pod in tenant.pods(tenant.get("AdapterDeployment", "chat")) if pod["metadata"]["name"] in names]
        return all(pod["metadata"].get("deletionTimestamp") for pod in now)

    tenant.wait(rolled, "the old pods are replaced", 90)
    new = fleet.pods(2)
    for pod in new:  # even if an engine loads the old adapter on the new base model, no request reaches it
        fleet.agent_says(pod, {"support-1.0.0": "Loaded", "support-1.0.1": "Loading"})
    fleet.until("Available", "RouteUnavailable")
    assert not any("support-1.0.0" in name for item in fleet.routes().backends for name in item.loaded)
    for pod in new:
        fleet.agent_says(pod)
    fleet.until_targets(support="support-1.0.1")
    fleet.until_wanted("support-1.0.1")
    fleet.until("Accepted", "Resolved")


def test_base_versions_make_an_adapter_compatible_with_newer_base_models(tenant: Tenant) -> None:
    base = base_model(tenant, version="1.0.0")
    tenant.trained("first", baseModel=base, output=output(baseVersions="^1"))
    tenant.trained("exact", baseModel=base)
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"], baseModel=base)

    def resolves(name: str) -> None:
        tenant.wait(
            lambda: [item.get("name") for item in fleet.status().get("adapters", [])] == [name],
            f"support@latest resolves to {name}",
        )

    resolves("support-1.0.1")
    new = change_files(tenant, base, "1.1.0") and base_digest(tenant, base)
    # support@latest resolves to the newest version that fits.
    resolves("support-1.0.0")
    # The Adapter is reconciled apart from the deployment.
    tenant.wait(
        lambda: (
            {"name": base, "version": "1.1.0", "digest": new}
            in tenant.status("Adapter", "support-1.0.0")["compatibility"]
        ),
        "the adapter's status names the new files",
    )
    template = tenant.get("Deployment", "chat")["spec"]["template"]["spec"]["initContainers"][0]["command"]
    assert new in template, "the pods must roll, because every adapter that they serve fits the new files"
    fleet.until("Accepted", "Resolved")

    # spec.baseVersions may be added later. spec.baseModel never changes.
    tenant.api.patch("Adapter", tenant.name, "support-1.0.1", {"spec": {"baseVersions": "1.1"}})
    resolves("support-1.0.1")
    with pytest.raises(Refused, match="only baseVersions, deletionPolicy and retention may be edited"):
        tenant.api.patch("Adapter", tenant.name, "support-1.0.1", {"spec": {"baseModel": "another"}})


# Deletion by the retention policy.


def test_unused_versions_expire_and_are_deleted_with_their_files(tenant: Tenant) -> None:
    policy = {"keep": 1, "unusedFor": "6s"}
    tenant.trained("first")
    assert not tenant.condition("Adapter", "support-1.0.0", "Retained"), (
        "without a policy there must be no Retained condition"
    )
    fleet = Fleet(tenant, "chat")
    (pod,) = fleet.serve(["support@^1"])
    tenant.until("Adapter", "support-1.0.0", "InUse", "Served")
    for name in ("second", "third"):
        tenant.trained(name, output=output(retention=policy))
    assert tenant.get("Adapter", "support-1.0.2")["spec"]["retention"] == policy
    tenant.job("missed", output=output(retention=policy))
    failing = tenant.running_pod("missed")
    tenant.publish_as_trainer("missed", failing, rejected=["exactMatch 0.1 < 0.5"])
    tenant.end_pod(failing)
    tenant.until("FineTuneJob", "missed", "Succeeded", "GateFailed")
    fleet.agent_says(pod)
    fleet.until_targets(support="support-1.0.2")
    fleet.until_wanted("support-1.0.2")
    fleet.agent_says(pod)

    # No version expires yet: 1.0.0 was served before, 1.0.1 is the version before the served 1.0.2,
    # and 1.0.3 is the newest.
    tenant.until("Adapter", "support-1.0.0", "InUse", "NotServed")
    for version in ("1.0.0", "1.0.1", "1.0.2", "1.0.3"):
        assert tenant.until("Adapter", f"support-{version}", "Retained", "Needed")["message"]
    tenant.trained("fourth", output=output(retention=policy))
    fleet.until_wanted("support-1.0.2", "support-1.0.4")
    fleet.agent_says(pod)
    fleet.until_targets(support="support-1.0.4")
    fleet.until_wanted("support-1.0.4")
    fleet.agent_says(pod)

    # A rollback would now use 1.0.2. The rejected version 1.0.3 and the two oldest versions expire.
    doomed = ("1.0.0", "1.0.1", "1.0.3")
    for version in doomed:
        told = tenant.until("Adapter", f"support-{version}", "Retained", "Expiring")
        announced = tenant.status("Adapter", f"support-{version}")["prunedAfter"]
        assert announced in told["message"] and "retention on support-1.0.4" in told["message"]
        # Version 1.0.3 was rejected, so it has no signature file.
        assert files(tenant, version) == [item for item in WHOLE if "sig" not in item or version != "1.0.3"]
    for version in doomed:
        tenant.gone("Adapter", f"support-{version}")
        assert files(tenant, version) == []
        tenant.until_events(f"support-{version}", "Expiring", "Pruned")
    settled(tenant)
    assert [tenant.condition("Adapter", f"support-{item}", "Retained")["reason"] for item in ("1.0.2", "1.0.4")] == [
        "Needed"
    ] * 2

    # When no deployment is left, only the newest version is kept.
    tenant.api.delete("AdapterDeployment", tenant.name, "chat")
    tenant.gone("Adapter", "support-1.0.2")
    settled(tenant)
    assert tenant.status("Adapter", "support-1.0.4")["stage"] == "Ready" and files(tenant, "1.0.4") == WHOLE


def test_a_version_that_a_running_job_compares_with_is_kept(tenant: Tenant) -> None:
    policy = {"keep": 1, "unusedFor": "3s"}
    tenant.trained("first", output=output(retention=policy))
    held_out = {"eval": {"uri": f"s3://graft/{tenant.name}/datasets/eval.jsonl"}}
    dataset = {"train": {"uri": f"s3://graft/{tenant.name}/datasets/train.jsonl"}} | held_out
    gates = [{"metric": "exactMatch", "over": "current", "minGain": 0.0}]
    tenant.job("careful", evaluation={"gates": gates}, dataset=dataset, output=output(retention=policy))
    pod = tenant.running_pod("careful")
    assert tenant.job_file("careful").current is not None
    tenant.trained("meanwhile", output=output(retention=policy, version="1.5.0"))
    told = tenant.until("Adapter", "support-1.0.0", "Retained", "Expiring")
    after = tenant.status("Adapter", "support-1.0.0")["prunedAfter"]
    kept = tenant.until("Adapter", "support-1.0.0", "Retained", "Needed")
    assert after in told["message"] and "a running FineTuneJob compares" in kept["message"]

    tenant.publish_as_trainer("careful", pod)
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", "careful", "Succeeded", "Published")
    tenant.gone("Adapter", "support-1.0.0")


# Compression and restore.


def test_an_inactive_version_is_compressed_and_restored_for_a_deployment(tenant: Tenant) -> None:
    policy = {"compressAfter": "3s"}
    tenant.trained("first", output=output(retention=policy))
    digest = tenant.get("Adapter", "support-1.0.0")["spec"]["artifact"]["digest"]
    manifest, _ = read_manifest(tenant.store, prefix(tenant, "1.0.0"), digest)
    tenant.trained("second", output=output(retention=policy))
    away = tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")
    assert "AdapterDeployment" in away["message"]
    tenant.wait(lambda: files(tenant, "1.0.0") == ARCHIVED, "the uncompressed file is deleted")
    settled(tenant)
    assert read_manifest(tenant.store, prefix(tenant, "1.0.0"), digest)[0] == manifest
    packed = tenant.store.get(f"{prefix(tenant, '1.0.0')}adapter_model.safetensors.xz")
    weights = next(file for file in manifest.files if file.name == "adapter_model.safetensors")
    assert hashlib.sha256(lzma.decompress(packed)).hexdigest() == weights.sha256
    seen = tenant.status("Adapter", "support-1.0.0")
    assert (seen["stage"], seen["storedBytes"]) == ("Archived", len(packed))
    assert tenant.status("Adapter", "support-1.0.1")["stage"] == "Ready", "the newest version must not be compressed"

    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])
    (pod,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0")
    assert files(tenant, "1.0.0") == WHOLE
    verify(tenant.store, prefix(tenant, "1.0.0"), digest)
    tenant.until_events("support-1.0.0", "Archived", "Restoring", "Verified")
    fleet.agent_says(pod)
    fleet.until("Available", "Serving")
    seen = tenant.status("Adapter", "support-1.0.0")
    assert seen["stage"] == "Ready" and "storedBytes" not in seen and seen["lastUsedTime"]

    # It is Needed while a deployment names it. Afterwards it is archived again.
    tenant.until("Adapter", "support-1.0.0", "Retained", "Needed", says="kept: used by chat")
    tenant.api.delete("AdapterDeployment", tenant.name, "chat")
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")

    # After the newer version is deleted, this version is the newest. The newest version is never archived, because
    # deployments and gates over the current version use it.
    tenant.api.delete("Adapter", tenant.name, "support-1.0.1")
    tenant.until("Adapter", "support-1.0.0", "Ready", "Verified")


def test_the_served_version_keeps_serving_while_a_newer_one_is_restored(tenant: Tenant) -> None:
    policy = {"compressAfter": "3s"}
    for name in ("first", "second"):
        tenant.trained(name)
    fleet = Fleet(tenant, "chat")
    (pod,) = fleet.serve(["support@1.0.0"])
    tenant.trained("third", output=output(version="2.0.0", retention=policy))
    tenant.until("Adapter", "support-1.0.1", "Ready", "Archived")
    tenant.wait(lambda: files(tenant, "1.0.1") == ARCHIVED, "the uncompressed file is deleted")
    assert tenant.status("Adapter", "support-1.0.0")["stage"] == "Ready"

    fleet.change(adapters=["support@^1"])
    fleet.until_wanted("support-1.0.0", "support-1.0.1")
    assert fleet.targets() == {"support": "support-1.0.0"}
    fleet.agent_says(pod)
    fleet.until_targets(support="support-1.0.1")


def test_a_composition_restores_its_archived_parent(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("other", adapter="returns")
    tenant.trained("second", output=output(version="2.0.0", retention={"compressAfter": "3s"}))
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")
    tenant.wait(lambda: files(tenant, "1.0.0") == ARCHIVED, "the uncompressed file is deleted")
    both = Maker(tenant, "desk").compose("support@^1", "returns@1.0.0")
    both.until("Composing")
    assert files(tenant, "1.0.0") == WHOLE
    assert [item["name"] for item in both.status()["parents"]] == ["support-1.0.0", "returns-1.0.0"]
    tenant.until("Adapter", "support-1.0.0", "Retained", "Needed", says="a composition uses it as a parent")


def test_an_adapter_created_again_over_compressed_files_is_archived_and_can_be_restored(tenant: Tenant) -> None:
    tenant.trained("first", output=output(retention={"compressAfter": "3s"}))
    tenant.trained("second", output=output(retention={"compressAfter": "3s"}))
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")
    tenant.wait(lambda: files(tenant, "1.0.0") == ARCHIVED, "the uncompressed file is deleted")
    spec = tenant.get("Adapter", "support-1.0.0")["spec"]
    tenant.api.delete("Adapter", tenant.name, "support-1.0.0")
    tenant.gone("Adapter", "support-1.0.0")
    assert files(tenant, "1.0.0") == ARCHIVED, "a user deleted the Adapter, and its deletionPolicy must keep the files"

    tenant.api.create(tenant.resource("Adapter", "support-1.0.0", spec))
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")
    Fleet(tenant, "chat").deploy(["support@1.0.0"])
    tenant.until("Adapter", "support-1.0.0", "Ready", "Verified")
    assert files(tenant, "1.0.0") == WHOLE


def test_a_damaged_compressed_copy_is_reported_and_never_served(tenant: Tenant) -> None:
    tenant.trained("first", output=output(retention={"compressAfter": "3s"}))
    tenant.trained("second", output=output(retention={"compressAfter": "3s"}))
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived")
    tenant.wait(lambda: files(tenant, "1.0.0") == ARCHIVED, "the uncompressed file is deleted")
    tenant.store.put(f"{prefix(tenant, '1.0.0')}adapter_model.safetensors.xz", lzma.compress(b"other weights"))
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])
    broken = tenant.until("Adapter", "support-1.0.0", "Ready", "DigestMismatch")
    assert "adapter_model.safetensors" in broken["message"]
    assert "DigestMismatch" in fleet.until("Accepted", "AdapterMissing")["message"] or fleet.wanted_names() == []


def test_killing_the_operator_during_compression_and_restore_loses_no_weights(
    tenant: Tenant, running: OperatorProcess
) -> None:
    source = random.Random(3)
    weights = b"".join(source.randbytes(3) + bytes([source.choice([60, 188])]) for _ in range(1_500_000))
    policy = {"compressAfter": "2s"}
    tenant.trained("first", weights=weights, output=output(retention=policy))
    digest = tenant.get("Adapter", "support-1.0.0")["spec"]["artifact"]["digest"]
    manifest, _ = read_manifest(tenant.store, prefix(tenant, "1.0.0"), digest)
    (file,) = archive.weights(manifest)
    tenant.trained("second", output=output(retention=policy))

    def whole_or_packed() -> None:
        there, key = files(tenant, "1.0.0"), prefix(tenant, "1.0.0") + file.name
        packed = file.name + archive.SUFFIX
        if packed in there:
            read = lzma.decompress(b"".join(tenant.store.chunks(key + archive.SUFFIX)))
            assert hashlib.sha256(read).hexdigest() == file.sha256
        else:
            assert tenant.store.sha256(key) == (file.sha256, file.size)

    def killed(pauses: list[float]) -> None:
        for pause in pauses:
            time.sleep(pause)
            running.kill9()
            whole_or_packed()
            running.start()

    killed([2.5, 3.5])
    tenant.until("Adapter", "support-1.0.0", "Ready", "Archived", 90)
    killed([0.2])
    tenant.wait(lambda: files(tenant, "1.0.0") == ARCHIVED, "the uncompressed file is deleted", 90)
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])
    killed([0.5, 1.5])
    fleet.until_wanted("support-1.0.0")
    assert files(tenant, "1.0.0") == WHOLE
    verify(tenant.store, prefix(tenant, "1.0.0"), digest)


def test_a_deployment_that_names_a_version_before_its_files_are_deleted_keeps_them(
    tenant: Tenant, running: OperatorProcess
) -> None:
    tenant.trained("first", output=output(retention={"compressAfter": "1h"}))
    tenant.trained("second", output=output(retention={"compressAfter": "1h"}))
    running.stop()
    # Simulate an operator that wrote the compressed copies and the reason Archived, and then crashed before it deleted
    # the uncompressed files. A deployment is created before the operator starts again.
    digest = tenant.get("Adapter", "support-1.0.0")["spec"]["artifact"]["digest"]
    manifest, _ = read_manifest(tenant.store, prefix(tenant, "1.0.0"), digest)
    archive.compress(tenant.store, prefix(tenant, "1.0.0"), manifest, lambda: False)
    status = tenant.status("Adapter", "support-1.0.0")
    for item in status["conditions"]:
        if item["type"] == "Ready":
            item |= {"status": "False", "reason": "Archived", "message": "unused"}
    path = KINDS["Adapter"].path(tenant.name, "support-1.0.0", "status")
    tenant.api.call("PATCH", path, {"status": status | {"stage": "Archived"}}, MERGE)
    weights = f"{prefix(tenant, '1.0.0')}adapter_model.safetensors"
    written = tenant.store.client.head_object(Bucket=BUCKET, Key=weights)["LastModified"]
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"])

    running.start()
    fleet.until_wanted("support-1.0.0")
    assert tenant.store.client.head_object(Bucket=BUCKET, Key=weights)["LastModified"] == written
    assert files(tenant, "1.0.0") == WHOLE
