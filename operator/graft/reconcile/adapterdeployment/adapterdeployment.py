"""Reconcile an AdapterDeployment.

    wait for the base model and the storage key -> sizing -> the agents' identity and ConfigMaps
    -> Deployment of serving pods, and its autoscaler -> residency (what each agent has loaded)
    -> the gateway's routes -> status per replica and per adapter

Adapters are added and removed through the wanted ConfigMap, without a change of the pods. serving.py decides the order
of a change. If the ConfigMap already exists, it is updated before the pods are. So a new version does not wait until
everything that pods need is checked. If the base model or the key disappears later, the deployment keeps serving what
it serves.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from graft.api import Adapter, AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.applied import covers
from graft.artifacts.layout import tenant_of
from graft.bounded import OutOfBounds
from graft.contracts.agent import WANTED_KEY, Residency, Wanted
from graft.contracts.gateway import ROUTES_KEY, Routes
from graft.contracts.message import BaseModelRef, Message
from graft.kube import KubeError, Manifest, owned_by
from graft.manifests import agent as agent_manifests
from graft.manifests.metadata import OWNER_UID
from graft.manifests.network import serving_policy
from graft.manifests.routes import routes_config_map, routes_identity, routes_name
from graft.manifests.serving import residency_name, serving_deployment, serving_name, wanted_name
from graft.reconcile.adapterdeployment import assignment, autoscaling, basechange, callers, scaling, serving
from graft.reconcile.adapterdeployment.deploymentstatus import KIND, World, observe, why_unavailable
from graft.reconcile.adapterdeployment.placing import place_engine
from graft.reconcile.shared import pods, scheduling
from graft.reconcile.shared.access import Trouble, ensure_credentials, gather_base_model, refusal_of
from graft.reconcile.shared.context import SOON, WAITING, Context
from graft.reconcile.shared.ending import delete_routes
from graft.reconcile.shared.jobs import not_started
from graft.reconcile.shared.ownership import of_deployment
from graft.reconcile.shared.stored import valid
from graft.status import find

M = TypeVar("M", bound=Message)
T = TypeVar("T")
SMALL = 500  # replicas times adapters, for which planning takes milliseconds


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one AdapterDeployment. Return the seconds until the next reconcile, or None to wait for an event."""
    raw = await ctx.cache.get(KIND, namespace, name)
    if raw is None:
        return None
    spec = AdapterDeployment.model_validate(raw)
    if spec.metadata.deletion_timestamp:
        # The routes are deleted first. The pods are then deleted with their owner, and finish their running requests.
        await delete_routes(ctx, spec)
        await autoscaling.forget(ctx, spec)
        await ctx.remove_finalizer(spec, KIND)
        return None
    claimed = await ctx.claim(raw, {})
    if claimed is None:
        return None
    if claimed is not raw:
        raw, spec = claimed, AdapterDeployment.model_validate(claimed)
    world = await _gather(ctx, spec)
    await _scale(ctx, world)
    running = world.wanted is not None
    serving_now = running and bool(world.pods)
    if not serving_now:
        world.trouble = world.trouble or await ensure_credentials(ctx, namespace)
    if running:
        await _apply_adapters(ctx, world)
    if serving_now:  # after the routes: a store that does not answer must not delay them
        world.trouble = world.trouble or await ensure_credentials(ctx, namespace)
    if world.trouble is None and world.base_model is not None:
        world.trouble = await _apply_pods(ctx, world, world.base_model)
    if not running:
        await _apply_adapters(ctx, world)
    status, observed = await _computed(ctx, world, observe, world, ctx.settings.gateway_url)
    await ctx.write_status(raw, status, observed)
    if world.trouble is not None or world.unscaled is not None or world.gateway_keys is None:
        return WAITING
    progressing = find(observed, "Progressing")
    return SOON if progressing is not None and progressing.status == "True" else world.scale.look_again


async def _gather(ctx: Context, spec: AdapterDeployment) -> World:
    namespace, cache = spec.metadata.namespace, ctx.cache
    children = {OWNER_UID: spec.metadata.uid}
    base, (listed, found_pods, sets), (deployment, wanted, routes, residency) = await asyncio.gather(
        gather_base_model(ctx, spec.spec.base_model, namespace),
        asyncio.gather(
            cache.list("Adapter", namespace),
            cache.list("Pod", namespace, children),
            cache.list("ReplicaSet", namespace, children, metadata_only=True),
        ),
        asyncio.gather(
            cache.get("Deployment", namespace, serving_name(spec)),
            cache.get("ConfigMap", namespace, wanted_name(spec)),
            cache.get("ConfigMap", ctx.settings.namespace, routes_name(spec)),
            cache.get("ConfigMap", namespace, residency_name(spec)),
        ),
    )
    trouble = (
        base
        if isinstance(base, Trouble)
        else scheduling.forbidden(spec.spec, ctx.settings.allowed, template=spec.spec.pod_template)
    )
    adapters = valid(Adapter, listed)
    current = None if isinstance(base, Trouble) else base.ref
    live = basechange.base_of(deployment["spec"]["template"]) if deployment else None
    chosen = basechange.in_force(spec, adapters, current, live)
    world = World(
        spec, trouble, chosen.base, chosen.resolutions, adapters, current or live, chosen.held, deployment=deployment
    )
    world.sizing = spec.status.sizing
    # Pods that are held on the old files of their base model keep their sizing, too.
    if not isinstance(base, Trouble) and (world.held is None or world.sizing is None):
        placed = await place_engine(ctx, spec, base)
        if isinstance(placed, Trouble):
            world.trouble = world.trouble or placed
        else:
            world.sizing = placed
    world.scale = await autoscaling.decide(ctx, spec, world.sizing, world.deployment)
    world.pods = of_deployment(found_pods, sets, deployment, spec.metadata.uid)
    world.not_started = await not_started(ctx, world.pods)
    world.wanted = _parse(Wanted, wanted, WANTED_KEY)
    world.routes = _parse(Routes, routes, ROUTES_KEY)
    world.findable = covers(wanted, agent_manifests.wanted_identity(spec)) and covers(
        routes, routes_identity(spec, ctx.settings)
    )
    keys_accepted = await callers.accepted(ctx, spec.metadata.uid, world.wanted)
    if isinstance(keys_accepted, Trouble):
        world.trouble = world.trouble or keys_accepted
        world.gateway_keys = world.wanted.gateway_keys if world.wanted else []
    else:
        world.gateway_keys = keys_accepted
    keys = (residency or {}).get("data") or {}
    alive = {pods.name(pod) for pod in world.pods}
    for key in alive & set(keys):
        found = _parse(Residency, residency, key)
        if found is not None:
            world.residency[key] = found
    # A pod that is not ours (yet) may be adopted later, and its agent reports only changes.
    if set(keys) - {pods.name(pod) for pod in found_pods}:
        # The event of a new pod may be later than its agent's first report.
        there = await cache.fresh("Pod", namespace, children, metadata_only=True)
        gone = sorted(set(keys) - {pods.name(pod) for pod in there})
        if gone:
            await ctx.kube.merge_patch("ConfigMap", namespace, residency_name(spec), {"data": dict.fromkeys(gone)})
    return world


def _parse(kind: type[M], config_map: Manifest | None, key: str) -> M | None:
    text = ((config_map or {}).get("data") or {}).get(key)
    if text is None:
        return None
    try:
        return kind.read(text)
    except OutOfBounds:
        return None  # written by hand, or by a newer operator: it is written again


async def _scale(ctx: Context, world: World) -> None:
    """Apply the decided number of replicas, even if the deployment has another problem: a request may wait for a pod."""
    live = world.deployment
    if live is None or not owned_by(live, world.spec.metadata.uid):
        return
    try:
        await autoscaling.scale(ctx, world.spec, world.scale, live)
    except KubeError as error:
        if (refused := refusal_of(ctx, world.spec.metadata.namespace, "the replicas", error)) is None:
            raise
        world.trouble = world.trouble or refused


async def _apply_pods(ctx: Context, world: World, base: BaseModelRef) -> Trouble | None:
    spec, sizing = world.spec, world.sizing or ServingSizing()
    replicas = autoscaling.replicas_to_apply(spec, world.scale, world.deployment)
    if world.deployment is not None and not owned_by(world.deployment, spec.metadata.uid):
        return Trouble(
            "CreationFailed",
            f"Deployment {serving_name(spec)} exists and does not belong to this AdapterDeployment. Delete that Deployment",
        )
    children = [
        agent_manifests.service_account(spec, ctx.settings),
        agent_manifests.role(spec),
        agent_manifests.role_binding(spec),
        agent_manifests.residency_config_map(spec),
        serving_policy(spec, ctx.settings),
        serving_deployment(spec, base, ctx.settings, sizing, replicas),
    ]
    try:
        await ctx.kube.ensure(*children)
        world.unscaled = await autoscaling.apply_guards(ctx, spec)
    except KubeError as error:
        if (refused := refusal_of(ctx, spec.metadata.namespace, "the children of the deployment", error)) is None:
            raise
        return refused
    return None


async def _computed(ctx: Context, world: World, call: Callable[..., T], *arguments: Any) -> T:
    """Return what a pure function returns.

    If the deployment is large, the function runs in a thread, so that the event loop does not wait.
    """
    replicas = max(len(world.pods), world.scale.replicas)
    if replicas * max(len(world.adapters), len(world.spec.spec.adapters)) <= SMALL:
        return call(*arguments)
    return await ctx.computed(world.spec.metadata.namespace, call, *arguments)


def _decide(world: World, bucket: str) -> tuple[Routes, Wanted]:
    """Return the gateway's routes, and what the agents must load (PURE)."""
    spec, tenant = world.spec, tenant_of(world.spec.metadata.namespace)
    routes = serving.plan_routes(
        spec,
        world.resolutions,
        tenant,
        world.replicas,
        world.routes,
        why_unavailable(world),
        world.wanted,
        stopped=world.scale.replicas == 0 and not world.pods,
    )
    known = [serving.wanted_adapter(tenant, item) for item in world.adapters if item.status.signature is not None]
    wanted = serving.plan_wanted(spec, world.resolved, world.wanted, routes, known)
    wanted = assignment.assign(wanted, spec, world.resolved, world.adapters, world.replicas, world.wanted)
    if wanted.assigned is None:
        coming = serving.expected(spec, world.resolutions, world.adapters, tenant, bucket)
        wanted = wanted.model_copy(update={"expected": coming})
    wanted = wanted.model_copy(update={"gateway_keys": world.gateway_keys})
    routes = assignment.leave_out_moved(routes, wanted)
    if scaling.may_sleep(spec, world.sizing) and (world.deployment is not None or world.trouble is None):
        assert spec.spec.autoscaling is not None  # noqa: S101
        routes = routes.model_copy(update={"idle_seconds": spec.spec.autoscaling.idle_seconds})
    if world.scale.asleep:  # its last pods finish their running requests and get no new ones
        routes = routes.model_copy(update={"backends": []})
    return routes, wanted


async def _apply_adapters(ctx: Context, world: World) -> None:
    """Write the gateway's routes, then what the agents load. So an adapter leaves the routes before it is drained."""
    spec = world.spec
    routes, wanted = await _computed(ctx, world, _decide, world, ctx.store.config.bucket)
    if routes != world.routes or not world.findable:
        await ctx.kube.apply(routes_config_map(spec, routes, ctx.settings))
    world.routes = routes
    if (wanted != world.wanted or not world.findable) and (world.trouble is None or world.wanted is not None):
        try:
            await ctx.kube.apply(agent_manifests.wanted_config_map(spec, wanted))
        except KubeError as error:
            if (refused := refusal_of(ctx, spec.metadata.namespace, "the ConfigMap of the agents", error)) is None:
                raise
            world.trouble = world.trouble or refused
    world.wanted = wanted
