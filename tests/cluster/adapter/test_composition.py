"""Adapter versions that are made without training: composed from other versions, or imported."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.layout import adapter_prefix
from graft.artifacts.versions import read_manifest
from graft.contracts.progress import Reason
from testbed.controlplane import ControlPlane
from testbed.shell import REPOSITORY
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.maker import Maker
from worlds.cluster.operator_process import BUCKET, OperatorProcess
from worlds.cluster.refused import refused
from worlds.cluster.tenant import API, BASE, Tenant

MODEL = REPOSITORY / "examples/tiny-llama/model"


def test_a_version_is_composed_and_served(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("second", adapter="returns")
    both = Maker(tenant, "desk").create(
        compose={"parents": [{"adapter": "support@^1", "weight": 0.7}, {"adapter": "returns@latest", "weight": 0.3}]}
    )
    pod = both.running_pod()
    assert both.status()["stage"] == "Composing"
    composition = both.file().composition
    assert composition is not None and composition.method == "cat"
    chosen = [(item["name"], item["version"], item["weight"]) for item in both.status()["parents"]]
    assert chosen == [("support-1.0.0", "1.0.0", 0.7), ("returns-1.0.0", "1.0.0", 0.3)]
    digests = [tenant.get("Adapter", name)["spec"]["artifact"]["digest"] for name, _, _ in chosen]
    assert [item.digest for item in composition.parents] == digests

    both.publish_as_trainer(pod)
    both.end_pod(pod)
    assert both.until("Verified")["status"] == "True"
    status = both.status()
    prefix = adapter_prefix(tenant.name, "desk", "1.0.0")
    manifest, digest = read_manifest(tenant.store, prefix, None)
    assert status["artifact"] == {"uri": f"s3://{BUCKET}/{prefix}", "digest": digest}
    assert (status["stage"], status["rank"]) == ("Ready", 16)
    assert [(item.version, item.weight) for item in manifest.parents] == [("1.0.0", 0.7), ("1.0.0", 0.3)]

    fleet = Fleet(tenant, "chat")
    fleet.deploy(["desk@1.0.0"])
    fleet.until_wanted("desk-1.0.0")
    assert [(item.uri, item.digest) for item in fleet.wanted().adapters] == [(f"s3://{BUCKET}/{prefix}", digest)]

    # Version 1.0.0 is used now. The next job of the same adapter gets the next version.
    tenant.job("third", adapter="desk")
    tenant.running_pod("third")
    assert tenant.job_file("third").output.version == "1.1.0"


def test_a_composition_waits_for_its_parents(tenant: Tenant) -> None:
    tenant.trained("first")
    both = Maker(tenant, "desk").compose("support@^1", "returns@1.0.0")
    assert "returns@1.0.0: no Adapter matches" in both.until("ParentMissing")["message"]
    assert both.status()["stage"] == "Waiting" and both.jobs() == ["first"]
    tenant.trained("second", adapter="returns")
    both.until("Composing")
    both.running_pod()
    # The chosen parents stay the same when a newer version is published.
    tenant.trained("third")
    assert [item["version"] for item in both.status()["parents"]] == ["1.0.0", "1.0.0"]


def test_incompatible_parents_are_refused_without_a_pod(tenant: Tenant) -> None:
    tenant.trained("first", rank=8)
    tenant.trained("second", adapter="returns", rank=4)
    both = Maker(tenant, "desk").compose("support@1.0.0", "returns@1.0.0", method="linear")
    text = both.until("ParentsIncompatible")["message"]
    assert "support-1.0.0 has rank 8, returns-1.0.0 has rank 4. Use method cat or svd" in text
    assert both.status()["stage"] == "Failed" and both.jobs() == ["first", "second"]
    Maker(tenant, "desk", "1.0.1").compose("support@1.0.0", "returns@1.0.0", method="svd").until("Composing")


def test_a_failed_import_reports_the_pods_message_and_is_not_retried(tenant: Tenant, running: OperatorProcess) -> None:
    theirs = Maker(tenant, "theirs").create(**{"import": {"uri": f"s3://{BUCKET}/{tenant.name}/uploads/a/"}})
    theirs.fail_pod(theirs.running_pod(), Reason.ADAPTER_INVALID, "auto_map names code to run.", "Use others.")
    failed = theirs.until("ImportInvalid")
    assert (failed["status"], failed["message"]) == ("False", "auto_map names code to run. Use others.")
    assert theirs.status()["stage"] == "Failed"
    tenant.until_events(theirs.name, "ImportInvalid")
    job = tenant.get("Job", "theirs-1.0.0-import")["metadata"]["uid"]

    # Neither a restart of the operator nor the deletion of the Job starts the import again.
    running.stop()
    tenant.api.delete("Job", tenant.name, "theirs-1.0.0-import")
    tenant.gone("Job", "theirs-1.0.0-import")
    running.start()
    Maker(tenant, "other").create(**{"import": {"uri": "hf://org/name"}}).until("Importing")
    assert theirs.until("ImportInvalid") == failed and theirs.jobs() == ["other-1.0.0-import"], job

    # An edit of a mutable field does not start it again either.
    tenant.api.patch("Adapter", tenant.name, theirs.name, {"spec": {"deletionPolicy": "Delete"}})
    tenant.wait(lambda: theirs.status()["observedGeneration"] == 2, "the operator reconciled the edit")
    assert theirs.status()["stage"] == "Failed" and theirs.jobs() == ["other-1.0.0-import"]


def test_a_pod_that_cannot_reach_the_store_is_replaced(tenant: Tenant) -> None:
    theirs = Maker(tenant, "theirs").create(**{"import": {"uri": "hf://org/name"}})
    first = theirs.running_pod()
    theirs.fail_pod(first, Reason.STORAGE_UNAVAILABLE, "The store did not answer.", "The Job tries again.")
    second = theirs.running_pod(but=(first,))
    theirs.publish_as_trainer(second)
    theirs.end_pod(second)
    theirs.until("Verified")


def test_an_import_from_another_tenant_is_refused(tenant: Tenant) -> None:
    uri = f"s3://{BUCKET}/somebody-else/adapters/secret/1.0.0/"
    theirs = Maker(tenant, "theirs").create(**{"import": {"uri": uri}})
    text = theirs.until("OutsideNamespace")["message"]
    assert uri in text and f"below s3://{BUCKET}/{tenant.name}/" in text
    assert theirs.jobs() == []


def test_an_already_published_version_is_never_overwritten(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.api.delete("Adapter", tenant.name, "support-1.0.0")
    tenant.gone("Adapter", "support-1.0.0")
    again = Maker(tenant, "support").create(**{"import": {"uri": "hf://org/name"}})
    text = again.until("VersionExists")["message"]
    assert "is already published" in text and "another version, or one with spec.artifact" in text
    assert again.jobs() == ["first"]


def test_deleting_an_adapter_during_its_import_deletes_its_job_and_files(tenant: Tenant) -> None:
    theirs = Maker(tenant, "theirs").create(deletionPolicy="Delete", **{"import": {"uri": "hf://org/name"}})
    pod = theirs.running_pod()
    theirs.publish_as_trainer(pod)
    uid = tenant.get("Adapter", theirs.name)["metadata"]["uid"]
    assert list(tenant.store.objects(f"{tenant.name}/runs/{uid}/")) != []
    tenant.api.delete("Adapter", tenant.name, theirs.name)
    tenant.gone("Adapter", theirs.name)
    assert theirs.jobs() == [] and tenant.api.list("Pod", tenant.name) == []
    assert list(tenant.store.objects(f"{tenant.name}/runs/{uid}/")) == []
    assert list(tenant.store.objects(f"{tenant.name}/adapters/theirs/")) == []
    tenant.gone("ConfigMap", "theirs-1.0.0-import")
    tenant.gone("NetworkPolicy", "theirs-1.0.0-import")


TWO = [{"adapter": "a@1.0.0"}, {"adapter": "b@latest"}]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "give exactly one of artifact (published files), compose and import"),
        ({"compose": {"parents": TWO}, "import": {"uri": "hf://a/b"}}, "give exactly one of artifact"),
        ({"compose": {"parents": TWO[:1]}}, "give two parents or more, or one with into: base"),
        ({"compose": {"parents": TWO}, "method": "full"}, "a composed version needs method: lora"),
        ({"compose": {"parents": TWO, "into": "base"}}, "method: full if compose.into is base"),
        ({"compose": {"parents": TWO, "method": "ties"}}, "density is required for the ties and dare methods"),
        ({"compose": {"parents": TWO, "density": 0.5}}, "density is required for the ties and dare methods"),
        ({"compose": {"parents": TWO, "svdRank": 8}}, "svdRank is allowed only for svd"),
        ({"compose": {"parents": TWO, "seed": 8}}, "seed is allowed only for the dare methods"),
        ({"compose": {"parents": TWO, "majoritySign": "total"}}, "majoritySign is allowed only for the ties and dareTies methods"),
        ({"compose": {"parents": [{"adapter": "a"}, {"adapter": "b@1"}]}}, "spec.compose.parents[0].adapter"),
        ({"import": {"uri": "https://example.com/a"}}, "spec.import.uri"),
        ({"import": {"uri": "hf://a/b"}, "job": {"name": "a", "uid": "b"}}, "job is allowed only with artifact"),
    ],
)  # fmt: skip
def test_an_invalid_composition_is_refused(tenant: Tenant, plane: ControlPlane, spec: Object, words: str) -> None:
    assert words in refused(plane, Maker(tenant, "wrong").manifest(**spec))


def test_compose_and_import_are_immutable(tenant: Tenant, plane: ControlPlane) -> None:
    both = Maker(tenant, "desk").compose("support@^1", "returns@1.0.0")
    other = both.manifest(compose={"parents": TWO})
    assert "a published version never changes" in refused(plane, other)
    assert "a published version never changes" in refused(plane, both.manifest(**{"import": {"uri": "hf://a/b"}}))
    tenant.api.patch("Adapter", tenant.name, both.name, {"spec": {"deletionPolicy": "Delete"}})
    assert "at most 52 characters" in refused(
        plane, Maker(tenant, "x" * 40, "1000.1000.1000").manifest(compose={"parents": TWO})
    )


# The next tests run the real trainer in place of the simulated pods.


def tuned(folder: Path, seed: int, rank: int) -> Path:
    """Write a LoRA of the example's model with random weights, as peft saves it. Return the folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def upload(tenant: Tenant, prefix: str, folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            tenant.store.upload(prefix + path.name, path)


def base_model(tenant: Tenant, name: str, source: str) -> None:
    spec: dict[str, Any] = {"source": source, "allowedNamespaces": [tenant.name]}
    tenant.api.create({"apiVersion": API, "kind": "BaseModel", "metadata": {"name": name}, "spec": spec})

    def ready() -> bool:
        found = tenant.api.get("BaseModel", None, name)
        return bool(found and found.get("status", {}).get("stage") == "Ready")

    tenant.wait(ready, f"BaseModel {name} is Ready")


@pytest.mark.timeout(1200)  # seconds; three trainer runs, each of which imports torch, possibly on a busy machine
def test_imported_adapters_are_merged_into_the_base_and_served_as_a_base_model(tenant: Tenant, tmp_path: Path) -> None:
    llama = f"llama-{hashlib.sha256(tenant.name.encode()).hexdigest()[:8]}"
    upload(tenant, f"models/{llama}/", MODEL)
    base_model(tenant, llama, f"s3://{BUCKET}/models/{llama}")
    for number, rank in ((1, 4), (2, 8)):
        upload(tenant, f"{tenant.name}/uploads/{number}/", tuned(tmp_path / f"tuned-{number}", number, rank))
        one = Maker(tenant, f"part{number}").create(
            baseModel=llama, **{"import": {"uri": f"s3://{BUCKET}/{tenant.name}/uploads/{number}/"}}
        )
        one.run_trainer(tmp_path / f"import-{number}")
        one.until("Verified")
        assert (one.status()["rank"], one.status()["targetModules"]) == (rank, ["q_proj", "v_proj"])

    parents = [{"adapter": "part1@^1", "weight": 0.7}, {"adapter": "part2@latest", "weight": 0.3}]
    whole = Maker(tenant, "whole").create(baseModel=llama, method="full", compose={"parents": parents, "into": "base"})
    whole.run_trainer(tmp_path / "compose")
    whole.until("Verified")
    manifest, _ = read_manifest(tenant.store, adapter_prefix(tenant.name, "whole", "1.0.0"), None)
    assert [(item.adapter, item.weight) for item in manifest.parents] == [("part1", 0.7), ("part2", 0.3)]
    # The version becomes the source of a BaseModel, and a deployment uses that BaseModel.
    uri = whole.status()["artifact"]["uri"]
    base_model(tenant, f"{llama}-merged", uri)
    found = tenant.api.get("BaseModel", None, f"{llama}-merged")
    config = json.loads((MODEL / "config.json").read_text())
    assert found is not None and found["status"]["facts"]["hiddenSize"] == config["hidden_size"]
    fleet = Fleet(tenant, "chat")
    fleet.deploy([], baseModel=f"{llama}-merged", routes=[{"model": "desk"}])
    fleet.until("Accepted", "Resolved")


def test_the_trainer_refuses_an_imported_adapter_of_another_model(tenant: Tenant, tmp_path: Path) -> None:
    # The adapter was made for the example's model. The base model of these tests has fewer layers.
    upload(tenant, f"{tenant.name}/uploads/a/", tuned(tmp_path / "tuned", 1, 4))
    theirs = Maker(tenant, "theirs").create(**{"import": {"uri": f"s3://{BUCKET}/{tenant.name}/uploads/a/"}})
    theirs.run_trainer(tmp_path / "import")
    text = theirs.until("ImportInvalid")["message"]
    assert f"updates 4 modules that {BASE} does not have" in text
    assert "Set spec.baseModel" in text and list(tenant.store.objects(f"{tenant.name}/adapters/theirs/")) == []
