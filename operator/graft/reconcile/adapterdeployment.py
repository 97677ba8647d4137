"""The life of an AdapterDeployment.

    wait for the base model and the key -> sizing -> agents' identity and ConfigMaps -> Deployment of serving pods, and what scales it
    -> residency (what each agent has loaded) -> the gateway's routes -> status per replica and per adapter

Adapters come and go through the wanted ConfigMap and never touch the pods; reconcile/serving.py decides the order of a change.
A deployment whose base model or key goes away later keeps serving what it serves.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from graft.api import Adapter, AdapterDeployment
from graft.api.adapterdeployment import (
    AdapterDeploymentStatus,
    LoadedAdapter,
    Replica,
    ResolvedAdapter,
    RoutedModel,
    ServingSizing,
)
from graft.api.meta import Condition
from graft.artifacts.layout import tenant_of
from graft.contracts import ENGINE_PORT, ROUTES_KEY, WANTED_KEY, BaseModelRef, Residency, Routes, Wanted
from graft.kube import KubeError, Manifest
from graft.manifests import agent as agent_manifests
from graft.manifests.common import OWNER_UID
from graft.manifests.network import serving_policy
from graft.manifests.routes import routes_config_map, routes_name
from graft.manifests.serving import (
    pod_selector,
    residency_name,
    serving_deployment,
    serving_name,
    wanted_name,
)
from graft.reconcile import autoscaling, compatibility, pods, scaling, serving
from graft.reconcile.access import Trouble, ensure_credentials, gather_base_model, not_bound
from graft.reconcile.context import SOON, WAITING, Context
from graft.reconcile.placing import place_engine
from graft.status import condition, find

KIND = "AdapterDeployment"


@dataclass
class World:
    """What exists for a deployment now."""

    spec: AdapterDeployment
    trouble: Trouble | None
    base_model: BaseModelRef | None
    resolutions: list[serving.Resolution]
    adapters: list[Adapter] = field(default_factory=list)
    current: BaseModelRef | None = None  # the BaseModel as it is now; base_model is what the pods are made with
    held: str | None = None  # why these differ
    deployment: Manifest | None = None
    pods: list[Manifest] = field(default_factory=list)
    residency: dict[str, Residency] = field(default_factory=dict)
    wanted: Wanted | None = None
    routes: Routes | None = None
    sizing: ServingSizing | None = None
    unscaled: Trouble | None = None  # why nothing moves the replicas; the pods serve all the same
    scale: scaling.Decision = field(default_factory=lambda: scaling.Decision(0, change=False))

    @property
    def replicas(self) -> list[serving.ReplicaView]:
        return [
            serving.ReplicaView(
                pod=pods.name(pod),
                address=f"{ip}:{ENGINE_PORT}" if (ip := pod.get("status", {}).get("podIP")) else "",
                ready=pods.is_ready(pod),
                residency=_own(self.residency.get(pods.name(pod)), pod),
                unfit=compatibility.unfit(tenant_of(self.spec.metadata.namespace), self.adapters, pod, self.current),
            )
            for pod in self.pods
            if not pod["metadata"].get("deletionTimestamp") and pods.phase(pod) not in {"Failed", "Succeeded"}
        ]


def _own(residency: Residency | None, pod: Manifest) -> Residency | None:
    """A pod's key counts only if that very pod wrote it."""
    return residency if residency is not None and residency.pod_uid == pod["metadata"]["uid"] else None


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """One look at one deployment; the seconds until the next look, or None."""
    raw = await ctx.kube.get(KIND, namespace, name)
    if raw is None:
        return None
    spec = AdapterDeployment.model_validate(raw)
    if spec.metadata.deletion_timestamp:
        # Traffic first; the pods then go with their owner, and finish what they are answering.
        await ctx.kube.delete("ConfigMap", ctx.settings.namespace, routes_name(spec))
        await autoscaling.forget(ctx, spec)
        await ctx.remove_finalizer(spec, KIND)
        return None
    if await ctx.add_finalizer(spec, KIND):
        return 0
    world = await _gather(ctx, spec)
    claimed = await _scale(ctx, world)
    if world.trouble is None and world.base_model is not None:
        world.trouble = await _apply_pods(ctx, world, world.base_model, claimed=claimed)
    await _apply_adapters(ctx, world)
    status, observed = observe(world, ctx.settings.gateway_url)
    await ctx.write_status(raw, status, observed)
    if world.trouble is not None or world.unscaled is not None:
        return WAITING
    progressing = find(observed, "Progressing")
    return SOON if progressing is not None and progressing.status == "True" else world.scale.look_again


async def _gather(ctx: Context, spec: AdapterDeployment) -> World:
    namespace = spec.metadata.namespace
    base = await gather_base_model(ctx, spec.spec.base_model, namespace)
    trouble = base if isinstance(base, Trouble) else await ensure_credentials(ctx, namespace)
    adapters = [Adapter.model_validate(item) for item in await ctx.kube.list("Adapter", namespace)]
    deployment = await ctx.kube.get("Deployment", namespace, serving_name(spec))
    current = None if isinstance(base, Trouble) else base.ref
    live = compatibility.base_of(deployment["spec"]["template"]) if deployment else None
    chosen = compatibility.in_force(spec, adapters, current, live)
    world = World(
        spec, trouble, chosen.base, chosen.resolutions, adapters, current or live, chosen.held, deployment=deployment
    )
    world.sizing = spec.status.sizing
    # Pods that are held on the old files of their base model keep their size as well.
    if not isinstance(base, Trouble) and (world.held is None or world.sizing is None):
        placed = await place_engine(ctx, spec, base)
        if isinstance(placed, Trouble):
            world.trouble = world.trouble or placed
        else:
            world.sizing = placed
    world.scale = await autoscaling.decide(ctx, spec, world.sizing, world.deployment)
    world.pods = await ctx.kube.list("Pod", namespace, {OWNER_UID: spec.metadata.uid})
    world.wanted = _parse(Wanted, await ctx.kube.get("ConfigMap", namespace, wanted_name(spec)), WANTED_KEY)
    world.routes = _parse(
        Routes, await ctx.kube.get("ConfigMap", ctx.settings.namespace, routes_name(spec)), ROUTES_KEY
    )
    residency = await ctx.kube.get("ConfigMap", namespace, residency_name(spec))
    keys = (residency or {}).get("data") or {}
    alive = {pods.name(pod) for pod in world.pods}
    for key in keys:
        found = _parse(Residency, residency, key)
        if key in alive and found is not None:
            world.residency[key] = found
    gone = sorted(set(keys) - alive)
    if gone:
        await ctx.kube.merge_patch("ConfigMap", namespace, residency_name(spec), {"data": dict.fromkeys(gone)})
    return world


def _parse(model: type[Any], config_map: Manifest | None, key: str) -> Any:
    text = ((config_map or {}).get("data") or {}).get(key)
    if text is None:
        return None
    try:
        parsed: BaseModel = model.model_validate_json(text)
    except ValidationError:
        return None  # written by hand, or by a version to come: what should be there is written anew
    return parsed


async def _scale(ctx: Context, world: World) -> bool:
    """Make the replicas what was decided, even while something else is in trouble: a request may wait for a pod."""
    live = world.deployment
    if live is None or _owner(live) != world.spec.metadata.uid:
        return False
    try:
        return await autoscaling.scale(ctx, world.spec, world.scale, live)
    except KubeError as error:
        if error.status != 403:
            raise
        world.trouble = world.trouble or Trouble("NamespaceNotBound", not_bound(ctx, world.spec.metadata.namespace))
        return False


async def _apply_pods(ctx: Context, world: World, base: BaseModelRef, *, claimed: bool) -> Trouble | None:
    spec, sizing = world.spec, world.sizing or ServingSizing()
    replicas = autoscaling.replicas_to_apply(spec, world.scale, world.deployment)
    if world.deployment is not None and _owner(world.deployment) != spec.metadata.uid:
        return Trouble(
            "CreationFailed", f"a Deployment {serving_name(spec)} that is not of this AdapterDeployment is in the way"
        )
    children = [
        agent_manifests.service_account(spec),
        agent_manifests.role(spec),
        agent_manifests.role_binding(spec),
        agent_manifests.residency_config_map(spec),
        serving_policy(spec, ctx.settings),
        serving_deployment(spec, base, ctx.settings, sizing, replicas),
    ]
    try:
        for child in children:
            await ctx.kube.ensure(child)
        if claimed:
            await ctx.kube.apply(children[-1])
        world.unscaled = await autoscaling.apply_guards(ctx, spec)
    except KubeError as error:
        if error.status == 403 and "quota" not in str(error):
            return Trouble("NamespaceNotBound", f"{not_bound(ctx, spec.metadata.namespace)} ({error})")
        if error.status in {403, 409, 422}:
            return Trouble("CreationFailed", str(error))
        raise
    return None


def _owner(manifest: Manifest) -> str | None:
    return next(
        (item["uid"] for item in manifest["metadata"].get("ownerReferences", []) if item.get("controller")), None
    )


async def _apply_adapters(ctx: Context, world: World) -> None:
    """The gateway's table, then what the agents load: an adapter leaves the table before it is drained."""
    spec, tenant = world.spec, tenant_of(world.spec.metadata.namespace)
    routes = serving.plan_routes(spec, world.resolutions, tenant, world.replicas, world.routes, _why_unavailable(world))
    if scaling.may_sleep(spec, world.sizing) and (world.deployment is not None or world.trouble is None):
        assert spec.spec.autoscaling is not None  # noqa: S101
        routes = routes.model_copy(update={"idle_seconds": spec.spec.autoscaling.idle_seconds})
    if world.scale.asleep:  # its last pods finish what they answer, and get nothing new
        routes = routes.model_copy(update={"backends": []})
    if routes != world.routes:
        await ctx.kube.apply(routes_config_map(spec, routes, ctx.settings))
    world.routes = routes
    resolved = [serving.wanted_adapter(tenant, item.adapter) for item in world.resolutions if item.adapter is not None]
    known = [serving.wanted_adapter(tenant, item) for item in world.adapters if item.status.signature is not None]
    wanted = serving.plan_wanted(spec, resolved, world.wanted, routes, known)
    if wanted != world.wanted and (world.trouble is None or world.wanted is not None):
        try:
            await ctx.kube.apply(agent_manifests.wanted_config_map(spec, wanted))
        except KubeError as error:
            if error.status != 403:
                raise
            world.trouble = world.trouble or Trouble("NamespaceNotBound", not_bound(ctx, spec.metadata.namespace))
    world.wanted = wanted


def _why_unavailable(world: World) -> str | None:
    if world.spec.spec.replicas == 0:
        return "the deployment is scaled to zero"
    if world.scale.asleep:
        return "it is asleep; a request wakes it"
    if any(replica.ready for replica in world.replicas):
        return None
    if world.trouble is not None and not world.pods:
        return world.trouble.message
    stuck = [message for pod in world.pods if (message := pods.waiting_message(pod)) is not None]
    return stuck[0] if stuck else "its replicas are starting"


def observe(world: World, gateway_url: str) -> tuple[AdapterDeploymentStatus, list[Condition]]:
    """Status and conditions (PURE)."""
    spec = world.spec
    wanted = world.wanted or Wanted(base_model=spec.spec.base_model, max_lora_rank=0)
    replicas, ready = world.replicas, [replica for replica in world.replicas if replica.ready]
    shown = [_replica(replica, wanted) for replica in replicas]
    loaded_everywhere = [
        item for item in wanted.adapters if replicas and all(r.has(item.engine_name) for r in replicas)
    ]
    resolved = [_resolved(item, wanted, replicas) for item in world.resolutions]
    routed = _routed(world, ready)
    accepted = _accepted(world)
    available = _available(world, ready, routed)
    progressing = _progressing(world, wanted, shown)
    answered = [item for item in routed if item.replicas > 0]
    if world.scale.asleep and accepted.status == "True":
        stage = "Asleep"
    elif available.status == "True":
        healthy = accepted.status == "True" and progressing.reason != "AdapterFailed"
        stage = "Progressing" if progressing.status == "True" else "Available" if healthy else "Degraded"
    elif answered:
        stage = "Degraded"
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
            "adapters_text": f"{len(loaded_everywhere)}/{len(spec.spec.adapters)}",
            "selector": ",".join(f"{key}={value}" for key, value in pod_selector(spec).items()),
            "engine": world.sizing.engine if world.sizing is not None else None,
            "sizing": world.sizing,
            "endpoint": gateway_url or None,
            "adapters": resolved,
            "models": routed,
            "replica_status": shown,
        }
    )
    return status, [accepted, available, progressing]


def _replica(replica: serving.ReplicaView, wanted: Wanted) -> Replica:
    seen = {item.engine_name: item for item in (replica.residency.adapters if replica.residency else [])}
    items = [
        LoadedAdapter(adapter=item.adapter, state=item.state, reason=item.reason, message=item.message)
        for item in seen.values()
        if item.engine_name not in replica.unfit
    ]
    items += [
        LoadedAdapter(adapter=item.adapter, state="Pending")
        for item in wanted.adapters
        if item.engine_name not in seen and item.engine_name not in replica.unfit
    ]
    return Replica(
        pod=replica.pod, ready=replica.ready, adapters=sorted(items, key=lambda item: (item.adapter, item.state))
    )


def _resolved(item: serving.Resolution, wanted: Wanted, replicas: list[serving.ReplicaView]) -> ResolvedAdapter:
    restoring = item.restoring.metadata.name if item.restoring else None
    if item.adapter is None:
        return ResolvedAdapter(ref=item.ref, restoring=restoring, message=item.message)
    digest = item.adapter.spec.artifact.digest
    name = next((entry.engine_name for entry in wanted.adapters if entry.digest == digest), "")
    loaded = sum(replica.has(name) for replica in replicas)
    return ResolvedAdapter(
        ref=item.ref,
        name=item.adapter.metadata.name,
        version=item.adapter.spec.version,
        digest=digest,
        loaded=f"{loaded}/{len(replicas)}",
        restoring=restoring,
        message=item.message or None,
    )


def _routed(world: World, ready: list[serving.ReplicaView]) -> list[RoutedModel]:
    routed = []
    for entry in world.routes.routes if world.routes else []:
        target = entry.targets[0] if entry.targets else None
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
        return condition(KIND, "Available", "False", "ScaledToZero", "spec.replicas is 0; raise it to serve")
    if world.scale.asleep:
        text = "idle, so no pod runs; a request to one of its models wakes it, and waits until a pod is ready"
        return condition(KIND, "Available", "True", "Asleep", text)
    if world.trouble is not None and not world.pods:
        return condition(KIND, "Available", "False", "NotAccepted", world.trouble.message)
    if not ready:
        return condition(
            KIND, "Available", "False", "NoReplicaReady", _why_unavailable(world) or "its replicas are starting"
        )
    silent = [item.model for item in routed if item.replicas == 0]
    if silent:
        text = f"no replica answers {', '.join(silent)} yet; see status.adapters and status.replicaStatus"
        return condition(KIND, "Available", "False", "RouteUnavailable", text)
    return condition(
        KIND, "Available", "True", "Serving", f"{len(routed)} models: {', '.join(item.model for item in routed)}"
    )


def _progressing(world: World, wanted: Wanted, shown: list[Replica]) -> Condition:
    if world.trouble is not None and not world.pods:
        return condition(KIND, "Progressing", "False", "Complete", "nothing is on its way")
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
    return condition(KIND, "Progressing", "False", "Complete", "everything that is wanted is loaded everywhere")


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
