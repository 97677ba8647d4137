"""The number of replicas, and when a deployment sleeps. The tests need no cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from graft.api import AdapterDeployment
from graft.api.adapterdeployment import Autoscaling
from graft.api.deploymentstatus import ServingSizing
from graft.contracts.gateway import Demand, demand_interval
from graft.manifests.scaling import autoscaler, can_have_several
from graft.reconcile.adapterdeployment import autoscaling
from graft.reconcile.adapterdeployment.scaling import Decision, decide, demands, idle_seconds, may_sleep
from graft.status import now

SLEEPS = Autoscaling(min_replicas=0, max_replicas=4, idle_seconds=100)
WAIT = 100 + demand_interval(100)

PROMETHEUS = "http://prometheus:9090"


def deployment(**spec: Any) -> AdapterDeployment:
    full = {"baseModel": "tiny", "adapters": ["support@latest"]} | spec
    return AdapterDeployment.model_validate({"metadata": {"name": "chat", "namespace": "team"}, "spec": full})


def choose(live: int | None, idle: float | None = None, steady: float = 1e6, **changes: Any) -> Decision:
    autoscaling = changes.pop("autoscaling", SLEEPS)
    return decide(
        autoscaling, **{"sleeps": True, "stopped": False, "live": live, "idle": idle, "steady": steady} | changes
    )


def test_a_new_deployment_starts_awake() -> None:
    assert choose(None, steady=0) == Decision(1, change=True)
    fixed = Autoscaling(min_replicas=3, max_replicas=5)
    assert choose(None, autoscaling=fixed, sleeps=False) == Decision(3, change=True)


def test_a_deployment_falls_asleep_only_after_the_idle_time() -> None:
    assert choose(1, idle=WAIT - 1) == Decision(1, change=False, look_again=1.0)
    assert choose(1, idle=20) == Decision(1, change=False, look_again=WAIT - 20)
    assert choose(1, idle=WAIT) == Decision(0, change=True, asleep=True)
    assert choose(3, idle=WAIT) == Decision(0, change=True, asleep=True)
    assert choose(1, idle=None) == Decision(0, change=True, asleep=True)


def test_a_woken_deployment_stays_awake_for_the_idle_time() -> None:
    assert choose(1, idle=WAIT + 50, steady=5).replicas == 1
    assert choose(1, idle=None, steady=5) == Decision(1, change=False, look_again=WAIT - 5)


def test_a_recent_request_wakes_a_deployment_and_an_old_one_does_not() -> None:
    assert choose(0, idle=1) == Decision(1, change=True)
    assert choose(0, idle=100) == Decision(0, change=False, asleep=True)
    assert choose(0, idle=None) == Decision(0, change=False, asleep=True)


@pytest.mark.parametrize("idle", [0.0, 50.0, 99.0, 100.0, 110.0, 125.0, 1000.0])
def test_a_request_that_wakes_a_deployment_does_not_let_it_fall_asleep_again(idle: float) -> None:
    if choose(0, idle=idle).replicas == 1:
        assert not choose(1, idle=idle).asleep


def test_replicas_set_by_an_autoscaler_are_kept_within_the_bounds() -> None:
    bounds = Autoscaling(min_replicas=2, max_replicas=5)
    for live, replicas in ((1, 2), (2, 2), (4, 4), (9, 5), (0, 2)):
        assert choose(live, autoscaling=bounds, sleeps=False) == Decision(replicas, change=live != replicas)


def test_a_model_that_is_too_large_never_sleeps() -> None:
    spec = deployment(autoscaling={"minReplicas": 0, "maxReplicas": 1})
    assert may_sleep(spec, ServingSizing(strategy="serverless")) and may_sleep(spec, None)
    assert not may_sleep(spec, ServingSizing(strategy="dedicated"))
    assert not may_sleep(deployment(), None)
    assert not may_sleep(deployment(replicas=0, autoscaling={"minReplicas": 0, "maxReplicas": 1}), None)
    assert choose(0, sleeps=False) == Decision(1, change=True)


def test_replicas_zero_stops_a_deployment_despite_requests() -> None:
    assert choose(2, idle=1, stopped=True) == Decision(0, change=True)
    assert choose(0, idle=1, stopped=True) == Decision(0, change=False)


def test_invalid_reports_of_gateways_are_ignored() -> None:
    good = Demand(namespace="team", deployment="chat", at=now()).json_text()
    found = demands({"a": good, "b": "{", "c": '{"namespace": "team", "deployment": "chat", "at": "yesterday"}'})
    assert list(found) == ["a"]
    assert idle_seconds([]) is None
    ahead = Demand(namespace="team", deployment="chat", at="2999-01-01T00:00:00Z")
    old = Demand(namespace="team", deployment="chat", at="2020-01-01T00:00:00Z")
    assert idle_seconds([old, ahead]) == 0.0
    assert (idle_seconds([old]) or 0) > 1e8


def test_budget_and_autoscaler_exist_only_if_the_deployment_can_have_several_replicas() -> None:
    target = {"cpuPercent": 70}
    assert not can_have_several(deployment()) and can_have_several(deployment(replicas=2))
    assert can_have_several(deployment(autoscaling={"maxReplicas": 2, "target": target}))
    assert not can_have_several(deployment(replicas=3, autoscaling={"minReplicas": 0, "maxReplicas": 1}))
    assert autoscaler(deployment(replicas=2), PROMETHEUS) is None
    assert autoscaler(deployment(autoscaling={"minReplicas": 0, "maxReplicas": 1}), PROMETHEUS) is None
    assert autoscaler(deployment(replicas=0, autoscaling={"maxReplicas": 2, "target": target}), PROMETHEUS) is None
    found = autoscaler(deployment(autoscaling={"minReplicas": 0, "maxReplicas": 2, "target": target}), PROMETHEUS)
    assert found is not None and found["spec"]["minReplicas"] == 1  # an HPA with minReplicas 0 needs an alpha feature
    (metric,) = found["spec"]["metrics"]
    assert metric["containerResource"]["target"] == {"type": "Utilization", "averageUtilization": 70}


def test_replicas_with_different_adapters_are_removed_one_at_a_time() -> None:
    scaled: dict[str, Any] = {"maxReplicas": 4, "target": {"cpuPercent": 70}}
    everything = autoscaler(deployment(autoscaling=scaled), PROMETHEUS)
    assert everything is not None and "behavior" not in everything["spec"]
    parts = {"adaptersPerReplica": 10}
    found = autoscaler(deployment(autoscaling=scaled, limits=parts), PROMETHEUS)
    assert found is not None
    assert found["spec"]["behavior"]["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]
    keda = autoscaler(deployment(autoscaling=scaled | {"provider": "keda"}, limits=parts), PROMETHEUS)
    assert keda is not None
    behaviour = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour == found["spec"]["behavior"]


async def test_replicas_that_two_managers_own_are_written_once() -> None:
    """The operator's next apply of its own manifest gives up `replicas`. A missing base model delays that apply.

    If each reconcile wrote the time again until then, each write would trigger the next reconcile.
    """
    applied: list[tuple[str, int | None]] = []

    class Api:
        async def apply(self, manifest: dict[str, Any], *, manager: str) -> None:
            applied.append((manager, manifest.get("spec", {}).get("replicas")))

    def live(*managers: str) -> dict[str, Any]:
        fields = {"f:spec": {"f:replicas": {}}}
        claims = [{"manager": name, "operation": "Apply", "fieldsV1": fields} for name in managers]
        return {"metadata": {"managedFields": claims}, "spec": {"replicas": 1}}

    ctx: Any = SimpleNamespace(kube=Api())
    scaled = deployment(autoscaling={"minReplicas": 0, "maxReplicas": 1})
    keep, wake = Decision(1, change=False), Decision(2, change=True)
    await autoscaling.scale(ctx, scaled, keep, live("graft-operator"))
    assert applied == [("graft-scaling", 1)]
    await autoscaling.scale(ctx, scaled, keep, live("graft-operator", "graft-scaling"))
    assert applied == [("graft-scaling", 1)]
    await autoscaling.scale(ctx, scaled, wake, live("graft-operator", "graft-scaling"))
    await autoscaling.scale(ctx, scaled, keep, live("graft-scaling"))
    assert applied == [("graft-scaling", 1), ("graft-scaling", 2)]
    # Without autoscaling it gives up the field, so that a later autoscaling starts with a new time.
    await autoscaling.scale(ctx, deployment(), keep, live("graft-operator", "graft-scaling"))
    await autoscaling.scale(ctx, deployment(), keep, live("graft-operator"))
    await autoscaling.scale(ctx, deployment(), keep, live("graft-scaling"))
    assert applied[2:] == [("graft-scaling", None)]
