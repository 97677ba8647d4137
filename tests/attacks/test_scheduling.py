"""Specs that ask for other pods' places: priority, sandboxes, reserved nodes, and the address that the autoscaler calls."""

from typing import Any

import pytest
from graft.api import AdapterDeployment
from graft.api.meta import Placement
from graft.manifests.scaling import autoscaler
from graft.reconcile.adapterdeployment import autoscaling
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.scheduling import forbidden
from graft.settings import Allowed
from worlds.reconciling import SETTINGS, MemoryKube

EVERYTHING = {"priorityClasses": ["*"], "runtimeClasses": ["*"], "tolerations": [{"key": "*"}]}
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists"}


def told(allowed: dict[str, Any] | None = None, **fields: Any) -> str | None:
    found = forbidden(Placement.model_validate(fields), Allowed.model_validate(allowed or {}), "spec.compose")
    assert found is None or found.reason == "SchedulingForbidden"
    return found and found.message


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"priorityClassName": "system-cluster-critical"}, "priorityClassName: system", "allowedPriorityClasses"),
        ({"priorityClassName": "high"}, "priorityClassName: high", "allowedPriorityClasses"),
        ({"runtimeClassName": "host"}, "runtimeClassName: host", "allowedRuntimeClasses"),
        ({"tolerations": [GPU_TAINT, {"operator": "Exists"}]}, "tolerations[1]: every taint", "allowedTolerations"),
        ({"tolerations": [{"key": "", "operator": "Exists"}]}, "tolerations[0]: every taint", "allowedTolerations"),
        ({"tolerations": [{"key": "node-role.kubernetes.io/control-plane"}]}, "control-plane", "allowedTolerations"),
    ],
)
def test_what_the_platform_team_did_not_allow_is_refused(fields: dict[str, Any], path: str, value: str) -> None:
    """A spec asks for a priority, a runtime or a taint -> the message names the field and the value of the chart."""
    message = told(**fields)
    assert message is not None and message.startswith("spec.compose.") and path in message
    assert f"tenants.{value}" in message


def test_what_is_allowed_passes() -> None:
    """No attack: GPU nodes, the usual runtime of GPUs, and what the lists name."""
    assert told() is None
    assert told(tolerations=[GPU_TAINT], runtimeClassName="nvidia", priorityClassName="") is None
    taint = {"key": "team", "value": "red", "effect": "NoSchedule"}
    allowed = {"priorityClasses": ["batch", "system-node-critical"], "tolerations": [taint]}
    for name in allowed["priorityClasses"]:
        assert told(allowed, priorityClassName=name) is None
    assert told(allowed, tolerations=[taint | {"operator": "Equal"}]) is None


@pytest.mark.parametrize(
    "wider", [{"operator": "Exists"}, {"value": "blue"}, {"value": None}, {"effect": None}, {"effect": "NoExecute"}]
)
def test_a_toleration_that_matches_more_than_the_entry_is_refused(wider: dict[str, Any]) -> None:
    """The list allows one value and effect of a taint, and a spec tolerates more of it -> refused."""
    taint = {"key": "team", "value": "red", "effect": "NoSchedule"}
    asked = {key: value for key, value in (taint | wider).items() if value is not None}
    assert "tolerations[0]: team" in (told({"tolerations": [taint]}, tolerations=[asked]) or "")


def test_every_name_does_not_include_those_of_kubernetes_itself() -> None:
    """The platform team allows "*", and a spec asks for system-node-critical -> still refused."""
    assert told(EVERYTHING, priorityClassName="system-node-critical") is not None
    assert (
        told(EVERYTHING, priorityClassName="high", runtimeClassName="x", tolerations=[{"operator": "Exists"}]) is None
    )


async def test_no_spec_names_an_address_for_the_autoscaler() -> None:
    """A spec gives KEDA an address inside the cluster -> the field has no effect; only the chart names the Prometheus."""
    deployment = AdapterDeployment.model_validate({
        "metadata": {"name": "chat", "namespace": "shop", "uid": "u"},
        "spec": {
            "baseModel": "tiny", "adapters": ["a@latest"],
            "autoscaling": {"provider": "keda", "maxReplicas": 3, "target": {"requestsPerReplica": 2},
                            "prometheusUrl": "http://169.254.169.254/latest"},
        },
    })  # fmt: skip
    found = autoscaler(deployment, "http://prometheus:9090")
    assert found is not None and "169.254" not in str(found)
    assert found["spec"]["triggers"][0]["metadata"]["serverAddress"] == "http://prometheus:9090"
    kube = MemoryKube()
    trouble = await autoscaling.apply_guards(Context(kube, SETTINGS, None, None), deployment)  # type: ignore[arg-type]
    assert trouble is not None and trouble.reason == "PrometheusMissing"
    assert "autoscaling.prometheusUrl" in trouble.message
    assert "ScaledObject" not in {kind for kind, *_ in kube.objects}
