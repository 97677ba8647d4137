"""Compute an AdapterDeployment's status from the objects that exist (PURE)."""

from dataclasses import dataclass, field

from graft.api import Adapter, AdapterDeployment
from graft.api.deploymentstatus import (
    AdapterDeploymentStatus,
    LoadedAdapter,
    Replica,
    ResolvedAdapter,
    RoutedModel,
    ServingSizing,
)
from graft.api.meta import Condition
from graft.artifacts.layout import tenant_of
from graft.contracts.addresses import host_port
from graft.contracts.agent import Residency, ResidentAdapter, Wanted, WantedAdapter
from graft.contracts.gateway import Routes
from graft.contracts.message import BaseModelRef, cut
from graft.contracts.mounts import ENGINE_PORT
from graft.kube import Manifest
from graft.manifests.serving import has_tls, pod_selector
from graft.reconcile.adapterdeployment import assignment, basechange, scaling, serving
from graft.reconcile.shared import pods
from graft.reconcile.shared.access import Trouble
from graft.status import condition

KIND = "AdapterDeployment"
MESSAGE_BYTES = 500  # of an adapter in the status, which has one for each adapter and pod


@dataclass
class World:
    """The objects that exist for a deployment at the time of a reconcile."""

    spec: AdapterDeployment
    trouble: Trouble | None
    base_model: BaseModelRef | None
    resolutions: list[serving.Resolution]
    adapters: list[Adapter] = field(default_factory=list)  # of the namespace
    current: BaseModelRef | None = None  # the BaseModel as it is now; pods are made with base_model
    held: str | None = None  # why `base_model` is not `current`
    deployment: Manifest | None = None
    pods: list[Manifest] = field(default_factory=list)
    not_started: str | None = None  # why the node does not start the containers of a pod
    residency: dict[str, Residency] = field(default_factory=dict)
    wanted: Wanted | None = None
    routes: Routes | None = None
    findable: bool = True  # whether the two ConfigMaps have the labels and the owner by which others find them
    sizing: ServingSizing | None = None
    gateway_keys: list[str] | None = None  # the SHA-256 of the keys that engines accept; None: gateways need none
    unscaled: Trouble | None = None  # why nothing scales the replicas; the pods still serve
    scale: scaling.Decision = field(default_factory=lambda: scaling.Decision(0, change=False))

    @property
    def resolved(self) -> list[WantedAdapter]:
        """Return the versions that the entries of spec.adapters resolve to, in the same order."""
        tenant = tenant_of(self.spec.metadata.namespace)
        return [serving.wanted_adapter(tenant, item.adapter) for item in self.resolutions if item.adapter is not None]

    @property
    def replicas(self) -> list[serving.ReplicaView]:
        return [
            serving.ReplicaView(
                pod=pods.name(pod),
                address=host_port(ip, ENGINE_PORT) if (ip := pod.get("status", {}).get("podIP")) else "",
                ready=pods.is_ready(pod),
                residency=_own(self.residency.get(pods.name(pod)), pod),
                tls=has_tls(pod),
                unfit=basechange.unfit(tenant_of(self.spec.metadata.namespace), self.adapters, pod, self.current),
            )
            for pod in self.pods
            if not pod["metadata"].get("deletionTimestamp") and pods.phase(pod) not in {"Failed", "Succeeded"}
        ]


def _own(residency: Residency | None, pod: Manifest) -> Residency | None:
    """Return a pod's residency only if a pod with the same UID wrote it."""
    return residency if residency is not None and residency.pod_uid == pod["metadata"]["uid"] else None


def why_unavailable(world: World) -> str | None:
    """Return why no replica can answer now, or None if a replica can."""
    if world.spec.spec.replicas == 0:
        return "the deployment is scaled to zero"
    if world.scale.asleep:
        return "it is asleep; a request wakes it"
    if any(replica.ready for replica in world.replicas):
        return None
    if world.trouble is not None and not world.pods:
        return world.trouble.message
    stuck = [message for pod in world.pods if (message := pods.waiting_message(pod)) is not None]
    return stuck[0] if stuck else world.not_started or "its replicas are starting"


def observe(world: World, gateway_url: str) -> tuple[AdapterDeploymentStatus, list[Condition]]:
    """Return the status and the conditions of the deployment."""
    spec = world.spec
    wanted = world.wanted or Wanted(base_model=spec.spec.base_model, max_lora_rank=0)
    replicas, ready = world.replicas, [replica for replica in world.replicas if replica.ready]
    shown = [_replica(replica, wanted) for replica in replicas]
    resolved = [_resolved(item, wanted, replicas) for item in world.resolutions]
    complete = [item for item in resolved if item.loaded and _all_of(item.loaded)]
    routed = _routed(world, ready)
    accepted = _accepted(world)
    available = _available(world, ready, routed)
    progressing = _progressing(world, wanted, shown)
    degraded = _degraded(world, wanted, shown, routed, accepted, progressing)
    if world.scale.asleep and accepted.status == "True":
        stage = "Asleep"
    elif degraded.status == "True" and any(item.replicas for item in routed):
        stage = "Degraded"
    elif available.status == "True":
        stage = "Progressing" if progressing.status == "True" else "Available"
    elif world.trouble is not None and not world.pods:
        stage = "Waiting"
    else:
        stage = "Progressing" if progressing.status == "True" else "Unavailable"
    status = spec.status.model_copy(
        update={
            "stage": stage,
            "replicas": len(replicas),
            "ready_replicas": len(ready),
            "ready_text": f"{len(ready)}/{world.scale.replicas}",
            "adapters_text": f"{len(complete)}/{len(spec.spec.adapters)}",
            "selector": ",".join(f"{key}={value}" for key, value in pod_selector(spec).items()),
            "engine": world.sizing.engine if world.sizing is not None else None,
            "sizing": world.sizing,
            "endpoint": gateway_url or None,
            "adapters": resolved,
            "models": routed,
            "replica_status": shown,
        }
    )
    return status, [accepted, available, progressing, degraded]


def _replica(replica: serving.ReplicaView, wanted: Wanted) -> Replica:
    seen = {item.engine_name: item for item in (replica.residency.adapters if replica.residency else [])}
    items = [_loaded(item) for item in seen.values() if item.engine_name not in replica.unfit]
    items += [
        _loaded(
            ResidentAdapter(engine_name=item.engine_name, adapter=item.adapter, digest=item.digest, state="Pending")
        )
        for item in wanted.adapters
        if item.engine_name not in seen and item.is_for(replica.pod) and item.engine_name not in replica.unfit
    ]
    return Replica(
        pod=replica.pod, ready=replica.ready, adapters=sorted(items, key=lambda item: (item.adapter, item.state))
    )


def _loaded(item: ResidentAdapter) -> LoadedAdapter:
    return LoadedAdapter(
        adapter=item.adapter,
        version=item.adapter.rpartition("-")[2],  # an Adapter is named <adapter>-<version>
        digest=item.digest.removeprefix("sha256:")[:12],
        state=item.state,
        reason=item.reason,
        message=item.message and cut(item.message, MESSAGE_BYTES),
        load_seconds=item.load_seconds,
        size_bytes=item.size_bytes,
    )


def _resolved(item: serving.Resolution, wanted: Wanted, replicas: list[serving.ReplicaView]) -> ResolvedAdapter:
    restoring = item.restoring.metadata.name if item.restoring else None
    if item.adapter is None:
        return ResolvedAdapter(ref=item.ref, restoring=restoring, message=item.message)
    digest = item.adapter.published.digest
    name = next((entry.engine_name for entry in wanted.adapters if entry.digest == digest), "")
    homes = [replica for replica in replicas if wanted.is_for(name, replica.pod)]
    loaded = sum(replica.has(name) for replica in homes)
    return ResolvedAdapter(
        ref=item.ref,
        name=item.adapter.metadata.name,
        version=item.adapter.spec.version,
        digest=digest,
        loaded=f"{loaded}/{len(homes)}",
        restoring=restoring,
        message="it has no room on any replica. See the condition Degraded"
        if replicas and not homes
        else item.message or None,
    )


def _all_of(loaded: str) -> bool:
    count, _, homes = loaded.partition("/")
    return count == homes != "0"


def _routed(world: World, ready: list[serving.ReplicaView]) -> list[RoutedModel]:
    routed = []
    for entry in world.routes.routes if world.routes else []:
        target = entry.targets[0] if entry.targets else None
        if entry.steps:
            counts = [sum(replica.has(step.engine_model) for replica in ready) for step in entry.steps]
            names = [step.adapter for step in entry.steps if step.adapter]
            routed.append(RoutedModel(model=entry.model, sequence=names, replicas=min(counts)))
            continue
        if target is None:
            routed.append(RoutedModel(model=entry.model, adapter=None, replicas=0))
            continue
        count = sum(1 for replica in ready if target.adapter is None or replica.has(target.engine_model))
        routed.append(RoutedModel(model=entry.model, adapter=target.adapter, replicas=count))
    return routed


def _accepted(world: World) -> Condition:
    if world.trouble is not None:
        return condition(KIND, "Accepted", "False", world.trouble.reason, world.trouble.message)
    missing = [item for item in world.resolutions if item.adapter is None]
    if missing:
        text = "; ".join(item.message for item in missing)
        return condition(KIND, "Accepted", "False", missing[0].reason, text)
    if world.unscaled is not None:
        return condition(KIND, "Accepted", "False", world.unscaled.reason, world.unscaled.message)
    if world.held is not None:
        return condition(KIND, "Accepted", "True", "BaseModelHeld", world.held)
    names = ", ".join(item.adapter.metadata.name for item in world.resolutions if item.adapter) or "no adapters"
    return condition(KIND, "Accepted", "True", "Resolved", f"{names} on {world.spec.spec.base_model}")


def _available(world: World, ready: list[serving.ReplicaView], routed: list[RoutedModel]) -> Condition:
    if world.spec.spec.replicas == 0:
        return condition(KIND, "Available", "False", "ScaledToZero", "spec.replicas is 0. Raise it to serve")
    if world.scale.asleep:
        text = "the deployment is idle, so no pod runs. A request to one of its models wakes it, and waits until a pod is ready"
        return condition(KIND, "Available", "True", "Asleep", text)
    if world.trouble is not None and not world.pods:
        return condition(KIND, "Available", "False", "NotAccepted", world.trouble.message)
    if not ready:
        return condition(
            KIND, "Available", "False", "NoReplicaReady", why_unavailable(world) or "its replicas are starting"
        )
    silent = [item.model for item in routed if item.replicas == 0]
    if silent:
        text = f"no replica answers {', '.join(silent)} yet. See status.adapters and status.replicaStatus"
        return condition(KIND, "Available", "False", "RouteUnavailable", text)
    return condition(
        KIND, "Available", "True", "Serving", f"{len(routed)} models: {', '.join(item.model for item in routed)}"
    )


def _progressing(world: World, wanted: Wanted, shown: list[Replica]) -> Condition:
    if world.trouble is not None and not world.pods:
        return condition(KIND, "Progressing", "False", "Complete", "no change is in progress")
    failed = [(replica.pod, item) for replica in shown for item in replica.adapters if item.state == "Failed"]
    moving = [
        f"{item.adapter} {item.state.lower()}"
        for r in shown
        for item in r.adapters
        if item.state not in {"Loaded", "Failed"}
    ]
    if not _rolled_out(world):
        text = f"{sum(r.ready for r in shown)} of {world.scale.replicas} replicas are ready"
        return condition(KIND, "Progressing", "True", "RollingOut", text)
    if moving:
        return condition(KIND, "Progressing", "True", "RollingOut", ", ".join(sorted(set(moving))))
    if failed:
        pod, item = failed[0]
        return condition(
            KIND, "Progressing", "False", "AdapterFailed", f"{item.adapter} in pod {pod}: {item.reason}: {item.message}"
        )
    return condition(KIND, "Progressing", "False", "Complete", "all wanted adapters are loaded")


def _degraded(
    world: World,
    wanted: Wanted,
    shown: list[Replica],
    routed: list[RoutedModel],
    accepted: Condition,
    progressing: Condition,
) -> Condition:
    """Return the condition Degraded: less is served than the spec asks for, and retries cannot fix it.

    A first start or a change in progress is not Degraded.
    """
    replicas, ready = world.scale.replicas, sum(replica.ready for replica in shown)
    if replicas == 0 or not world.pods:
        return condition(KIND, "Degraded", "False", "AsExpected", "there are no pods that could serve")
    problems: list[tuple[str, str]] = []
    if accepted.status == "False":
        problems.append(("NotAccepted", accepted.message))
    failed = [(replica.pod, item) for replica in shown for item in replica.adapters if item.state == "Failed"]
    if failed:
        pod, item = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        problems.append(("AdapterFailed", f"{item.adapter} in pod {pod}: {item.reason}: {item.message}{more}"))
    names = {replica.pod for replica in shown}
    short = assignment.shortage(world.spec, wanted, world.resolved, world.adapters, names, replicas)
    if short is not None and not (short.passing and progressing.status == "True"):
        problems.append(("NoRoom", short.message))
    settled = _settled(world.spec)
    # Replicas that an autoscaler has just added are still starting. Replicas that were ready are lost until they
    # return.
    lost = ready < world.spec.status.ready_replicas or _was_degraded(world.spec)
    if ready < replicas and ((settled and lost) or _given_up(world)):
        problems.append(("ReplicaUnavailable", f"{ready} of {replicas} replicas are ready{_why_not_ready(world)}"))
    silent = [item.model for item in routed if item.replicas == 0]
    if silent and (settled or progressing.status == "False"):
        problems.append(("RouteUnavailable", f"no replica answers {', '.join(silent)}"))
    if not problems:
        return condition(KIND, "Degraded", "False", "AsExpected", "nothing is wrong")
    return condition(KIND, "Degraded", "True", problems[0][0], "; ".join(text for _, text in problems))


def _settled(spec: AdapterDeployment) -> bool:
    """Return whether everything was served once since the spec changed.

    Then everything that is missing now was lost.
    """
    now = {item.type: item for item in spec.status.conditions if item.observed_generation == spec.metadata.generation}
    if _was_degraded(spec):
        return True
    started = "Available" in now and now["Available"].reason in {"Serving", "RouteUnavailable"}
    return started and "Progressing" in now and now["Progressing"].status == "False"


def _was_degraded(spec: AdapterDeployment) -> bool:
    """Return whether the last reconcile reported Degraded for the same spec."""
    return any(
        item.type == "Degraded" and item.status == "True" and item.observed_generation == spec.metadata.generation
        for item in spec.status.conditions
    )


def _given_up(world: World) -> bool:
    """Return whether the Deployment reports that its rollout makes no progress."""
    conditions = (world.deployment or {}).get("status", {}).get("conditions", [])
    return any(item["type"] == "Progressing" and item["status"] == "False" for item in conditions)


def _why_not_ready(world: World) -> str:
    stuck = [message for pod in world.pods if (message := pods.waiting_message(pod)) is not None]
    why = stuck[0] if stuck else world.not_started
    return f": {why}" if why else ""


def _rolled_out(world: World) -> bool:
    if world.deployment is None:
        return False
    status, metadata = world.deployment.get("status", {}), world.deployment["metadata"]
    replicas = world.scale.replicas
    return bool(
        status.get("observedGeneration", 0) >= metadata.get("generation", 0)
        and status.get("updatedReplicas", 0) == replicas
        and status.get("replicas", 0) == replicas
        and status.get("readyReplicas", 0) == replicas
    )
