"""The status of an AdapterDeployment. `Degraded` reports a fault that retries cannot fix."""

from typing import Any

from graft.api import Adapter, AdapterDeployment
from graft.api.deploymentstatus import AdapterDeploymentStatus, ServingSizing
from graft.api.meta import Condition
from graft.contracts.agent import Residency, ResidentAdapter
from graft.reconcile.adapterdeployment import assignment, scaling
from graft.reconcile.adapterdeployment.deploymentstatus import World, observe
from graft.reconcile.adapterdeployment.placing import missing_image, unknown_parser
from graft.reconcile.adapterdeployment.serving import plan_routes, plan_wanted, resolve, wanted_adapter
from graft.reconcile.shared.access import Trouble
from graft.status import find, merge
from worlds.deployments import adapter, deployment

X, Y = adapter("1.0.0", name="x"), adapter("1.0.0", name="y")
ROLLED_OUT = {"observedGeneration": 1, "updatedReplicas": 2, "replicas": 2, "readyReplicas": 2}


def pod(name: str, *, ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    status = {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions}
    return {"metadata": {"name": name, "uid": name}, "spec": {"containers": []}, "status": status}


def told(name: str, *adapters: Adapter, **states: str) -> Residency:
    """Return the report of the agent of a pod. `states` gives the state of each adapter that is not Loaded."""
    resident = [
        ResidentAdapter(
            engine_name=wanted_adapter("shop", item).engine_name,
            adapter=item.metadata.name,
            digest=item.spec.artifact.digest,
            state=states.get(item.spec.adapter, "Loaded"),  # type: ignore[arg-type]
            reason="RankTooHigh" if item.spec.adapter in states else None,
            message="raise the limit" if item.spec.adapter in states else None,
            load_seconds=1.5,
            size_bytes=4096,
        )
        for item in adapters
    ]
    return Residency(pod=name, pod_uid=name, ready=True, adapters=resident)


def world(
    pods: list[dict[str, Any]],
    residency: list[Residency],
    *,
    before: list[Condition] | None = None,
    trouble: Trouble | None = None,
    rollout: dict[str, Any] | None = None,
    **spec: Any,
) -> World:
    """Return a deployment as the reconciler sees it after its writes."""
    resource = deployment(**({"adapters": ["x@latest", "y@latest"], "replicas": 2} | spec))
    resource = AdapterDeployment(
        metadata=resource.metadata.model_copy(update={"generation": 1}),
        spec=resource.spec,
        status=AdapterDeploymentStatus(conditions=before or [], ready_replicas=2 if before else 0),
    )
    found = World(resource, trouble, None, resolve(resource, [X, Y]), [X, Y])
    found.scale = scaling.Decision(resource.spec.replicas, change=False)
    found.deployment = {"metadata": {"generation": 1}, "status": ROLLED_OUT | (rollout or {})}
    found.pods, found.residency = pods, {item.pod: item for item in residency}
    routes = plan_routes(resource, found.resolutions, "shop", found.replicas, None, None)
    wanted = plan_wanted(resource, found.resolved, None, routes)
    found.wanted = assignment.assign(wanted, resource, found.resolved, found.adapters, found.replicas, None)
    found.routes = assignment.leave_out_moved(routes, found.wanted)
    return found


def seen(found: World) -> tuple[AdapterDeploymentStatus, dict[str, Condition]]:
    status, conditions = observe(found, "http://gateway")
    return status, {item.type: item for item in merge([], conditions, 1, "2026-01-01T00:00:00Z")}


HEALTHY = world([pod("a"), pod("b")], [told("a", X, Y), told("b", X, Y)])


def test_a_deployment_that_serves_every_adapter_is_available() -> None:
    status, conditions = seen(HEALTHY)
    assert status.stage == "Available" and status.adapters_text == "2/2"
    assert (conditions["Degraded"].status, conditions["Degraded"].reason) == ("False", "AsExpected")


def test_the_status_shows_each_adapter_of_each_replica() -> None:
    status, _ = seen(HEALTHY)
    assert status.replica_status is not None
    shown = status.replica_status[0].adapters[0]
    assert (shown.adapter, shown.version, shown.state) == ("x-1.0.0", "1.0.0", "Loaded")
    assert X.spec.artifact.digest == f"sha256:{shown.digest}" + X.spec.artifact.digest[19:]
    assert (shown.load_seconds, shown.size_bytes) == (1.5, 4096)


def test_a_starting_replica_is_not_degraded() -> None:
    found = world([pod("a"), pod("b", ready=False)], [told("a", X, Y)], rollout={"readyReplicas": 1})
    status, conditions = seen(found)
    assert conditions["Progressing"].reason == "RollingOut" and status.stage == "Progressing"
    assert conditions["Degraded"].status == "False"


def test_a_replica_that_was_ready_and_is_not_any_more_is_degraded() -> None:
    _, before = seen(HEALTHY)
    found = world(
        [pod("a"), pod("b", ready=False)],
        [told("a", X, Y), told("b", X, Y)],
        before=list(before.values()),
        rollout={"readyReplicas": 1},
    )
    status, conditions = seen(found)
    assert conditions["Degraded"].reason == "ReplicaUnavailable" and status.stage == "Degraded"
    found.spec.status.conditions = list(conditions.values())
    assert seen(found)[1]["Degraded"].reason == "ReplicaUnavailable"  # until the replica is ready again
    found.spec.metadata.generation = 2
    assert seen(found)[1]["Degraded"].status == "False"  # a changed spec starts a new rollout


def test_a_replica_that_an_autoscaler_has_added_is_progressing() -> None:
    _, before = seen(HEALTHY)
    autoscaling = {"minReplicas": 1, "maxReplicas": 4, "target": {"cpuPercent": 70}}
    found = world(
        [pod("a"), pod("b"), pod("c", ready=False)],
        [told("a", X, Y), told("b", X, Y)],
        before=list(before.values()),
        rollout={"replicas": 3, "updatedReplicas": 3},
        autoscaling=autoscaling,
    )
    found.scale = scaling.Decision(3, change=False)
    status, conditions = seen(found)
    assert conditions["Degraded"].reason == "AsExpected" and status.stage == "Progressing"


def test_a_rollout_that_has_stopped_is_degraded() -> None:
    stopped = {"readyReplicas": 1, "conditions": [{"type": "Progressing", "status": "False"}]}
    found = world([pod("a"), pod("b", ready=False)], [told("a", X, Y)], rollout=stopped)
    assert seen(found)[1]["Degraded"].reason == "ReplicaUnavailable"


def test_an_adapter_that_cannot_be_loaded_is_named_with_its_reason() -> None:
    found = world([pod("a"), pod("b")], [told("a", X, Y, y="Failed"), told("b", X, Y, y="Failed")])
    status, conditions = seen(found)
    degraded = conditions["Degraded"]
    assert degraded.reason == "AdapterFailed" and status.stage == "Degraded"
    assert degraded.message.startswith("y-1.0.0 in pod a: RankTooHigh: raise the limit (and 1 more)")
    assert "no replica answers shop/y" in degraded.message


def test_an_adapter_without_a_free_slot_is_reported_with_a_remedy() -> None:
    found = world([pod("a"), pod("b")], [told("a", X), told("b", Y)], limits={"adaptersPerReplica": 1})
    status, conditions = seen(found)
    assert conditions["Degraded"].reason == "NoRoom"
    assert "raise spec.replicas to 4, or raise spec.limits.adaptersPerReplica to 2" in conditions["Degraded"].message
    assert status.adapters is not None and [item.loaded for item in status.adapters] == ["1/1", "1/1"]
    assert conditions["Available"].status == "True"


def test_the_status_says_that_an_adapter_is_on_no_replica() -> None:
    found = world([pod("a")], [told("a", X)], limits={"adaptersPerReplica": 1}, replicas=1)
    status, _ = seen(found)
    assert status.adapters is not None
    assert status.adapters[1].loaded == "0/0" and "no room" in str(status.adapters[1].message)


def test_a_missing_adapter_is_named_while_the_others_are_served() -> None:
    found = world([pod("a"), pod("b")], [told("a", X), told("b", X)], adapters=["x@latest", "z@latest"])
    _, conditions = seen(found)
    assert conditions["Degraded"].reason == "NotAccepted" and "z@latest" in conditions["Degraded"].message
    assert find(list(conditions.values()), "Accepted").status == "False"  # type: ignore[union-attr]


def test_a_deployment_that_waits_for_its_base_model_is_not_degraded() -> None:
    found = world([], [], trouble=Trouble("BaseModelMissing", "there is no BaseModel tiny"))
    status, conditions = seen(found)
    assert status.stage == "Waiting" and conditions["Degraded"].status == "False"


def test_a_parser_that_the_engine_lacks_is_named_with_those_that_it_has() -> None:
    transformers, vllm = ServingSizing(engine="transformers"), ServingSizing(engine="vllm")
    unknown = deployment(toolCallParser="deepseek_v31")
    trouble = unknown_parser(unknown, transformers)
    assert trouble is not None
    _, conditions = seen(world([], [], trouble=trouble))
    accepted = conditions["Accepted"]
    assert (accepted.status, accepted.reason) == ("False", "ToolCallParserUnknown")
    assert "deepseek_v31" in accepted.message and "hermes, llama3_json, llama4_json, mistral" in accepted.message
    assert unknown_parser(unknown, vllm) is None, "vLLM has more parsers"
    assert unknown_parser(deployment(toolCallParser="hermes"), transformers) is None
    assert unknown_parser(deployment(), transformers) is None


def test_without_an_image_of_vllm_the_message_says_what_to_set() -> None:
    vllm = ServingSizing(engine="vllm")
    trouble = missing_image(vllm, "")
    assert trouble is not None
    _, conditions = seen(world([], [], trouble=trouble))
    accepted = conditions["Accepted"]
    assert (accepted.status, accepted.reason) == ("False", "EngineImageMissing")
    assert "images.vllm.repository" in accepted.message and "spec.engine to transformers" in accepted.message
    assert missing_image(vllm, "vllm:1") is None
    assert missing_image(ServingSizing(engine="transformers"), "") is None
