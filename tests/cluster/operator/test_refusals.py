"""`kubectl apply` refuses invalid manifests with a message that names the field or the rule."""

from typing import Any

import pytest
from testbed.controlplane import ControlPlane
from worlds.cluster.refused import refused
from worlds.cluster.tenant import BASE, Tenant

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"lora": {}, "qlora": {}}}, "give exactly one method: full, lora, qlora or promptTuning"),
        ({"method": {}}, "give exactly one method: full, lora, qlora or promptTuning"),
        ({"method": {"lora": {"rank": 0}}}, "spec.method.lora.rank: Invalid value: 0"),
        ({"dataset": {"train": {"uri": "train.jsonl"}}}, "spec.dataset.train.uri"),
        ({"learningRate": 0.1}, 'unknown field "spec.learningRate"'),
        ({"method": {"qlora": {}}, "training": {"sharding": "fsdp"}}, "fsdp cannot be used with qlora"),
        ({"training": {"sharding": "fsdp", "optim": "adafactor"}}, "fsdp cannot be used with adamw8bit or adafactor"),
        ({"nodes": 2, "resources": None}, "nodes above 1 needs resources"),
        ({"queue": "q", "suspend": True}, "suspend must not be true if queue is set"),
        ({"evaluation": {"gates": [{"metric": "exactMatch"}]}}, "give at least one of min, max and minGain"),
        ({"evaluation": {"suites": [{"name": "a"}]}}, "give uri (a JSONL file) or lmEval (a task), and not both"),
        ({"evaluation": {"baselines": ["zeroShot", "zeroShot"]}}, "uplicate value"),
        (
            {"dataset": {"train": {"uri": "s3://graft/a/b"}, "eval": {"uri": "s3://graft/a/c"}, "evalSplit": 0.1}},
            "give eval (a source) or evalSplit (a share of train), not both",
        ),
        ({"training": {"epochs": -1}}, "spec.training.epochs"),
        ({"output": {"adapter": "support", "version": "v1"}}, "spec.output.version"),
        (
            {"resources": {"limits": {"memory": "lots"}}},
            'spec.resources.limits[memory]: Invalid value: "": must be an amount',
        ),
    ],
)
def test_an_invalid_job_is_refused(tenant: Tenant, plane: ControlPlane, change: dict[str, Any], words: str) -> None:
    assert words in refused(plane, tenant.job_manifest("wrong", **change))
    assert tenant.api.get("FineTuneJob", tenant.name, "wrong") is None


def test_names_that_are_too_long_are_refused(tenant: Tenant, plane: ControlPlane) -> None:
    assert "at most 50 characters" in refused(plane, tenant.job_manifest("x" * 51))
    deployment = tenant.resource("AdapterDeployment", "x" * 46, {"baseModel": BASE, "adapters": ["a@latest"]})
    assert "at most 45 characters" in refused(plane, deployment)


def test_the_spec_of_a_job_never_changes(tenant: Tenant, plane: ControlPlane) -> None:
    tenant.job("fixed")
    for change in ({"method": {"lora": {"rank": 4}}}, {"spot": True}, {"training": {"seed": 7}}, {"queue": "q"}):
        text = refused(plane, tenant.job_manifest("fixed", **change))
        assert "the spec is immutable, except for suspend, ttlSecondsAfterFinished, restarts" in text, change


@pytest.mark.parametrize("uri", ["s3://graft/", "s3:///key/", "s3://graft/key", "hf://org/name/"])
def test_an_artifact_uri_that_is_not_a_prefix_is_refused(tenant: Tenant, plane: ControlPlane, uri: str) -> None:
    spec = {"adapter": "support", "version": "1.0.0", "baseModel": "tiny", "method": "lora"}
    words = refused(
        plane, tenant.resource("Adapter", "support-1.0.0", spec | {"artifact": {"uri": uri, "digest": DIGEST}})
    )
    assert "spec.artifact.uri" in words


def test_a_published_version_never_changes(tenant: Tenant, plane: ControlPlane) -> None:
    artifact = {"uri": f"s3://graft/{tenant.name}/adapters/support/1.0.0/", "digest": DIGEST}
    spec = {"adapter": "support", "version": "1.0.0", "baseModel": BASE, "method": "lora", "artifact": artifact}
    tenant.api.create(tenant.resource("Adapter", "support-1.0.0", spec))
    changed = spec | {"artifact": artifact | {"digest": "sha256:" + "1" * 64}}
    text = refused(plane, tenant.resource("Adapter", "support-1.0.0", changed))
    assert "a published version never changes" in text
    assert "metadata.name must be <adapter>-<version>" in refused(plane, tenant.resource("Adapter", "other", spec))
    tenant.api.patch("Adapter", tenant.name, "support-1.0.0", {"spec": {"deletionPolicy": "Delete"}})
    tenant.until("Adapter", "support-1.0.0", "Ready", "ManifestMissing")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            {"adapters": ["support@latest"], "routes": [{"model": "sales", "adapter": "sales"}]},
            "each route's adapter must be one of adapters",
        ),
        ({"adapters": ["support@1.0.0", "support@latest"]}, "name each adapter once"),
        ({"adapters": ["support@latest", "support@latest"]}, "uplicate value"),
        ({"adapters": []}, "nothing to serve"),
        ({"adapters": ["support"]}, "spec.adapters[0]"),
        ({"adapters": ["support"]}, "must be <adapter>@<version>, for example support@latest"),
        ({"adapters": ["support@latest"], "limits": {"maxLoraRank": 65}}, "spec.limits.maxLoraRank"),
        ({"adapters": ["support@latest"], "replicas": -1}, "spec.replicas"),
    ],
)
def test_an_invalid_deployment_is_refused(
    tenant: Tenant, plane: ControlPlane, spec: dict[str, Any], words: str
) -> None:
    assert words in refused(plane, tenant.resource("AdapterDeployment", "wrong", {"baseModel": BASE} | spec))


def test_the_base_model_of_a_deployment_never_changes(tenant: Tenant, plane: ControlPlane) -> None:
    spec = {"baseModel": BASE, "adapters": ["support@latest"]}
    tenant.api.create(tenant.resource("AdapterDeployment", "fixed", spec))
    text = refused(plane, tenant.resource("AdapterDeployment", "fixed", spec | {"baseModel": "other"}))
    assert "baseModel is immutable" in text
