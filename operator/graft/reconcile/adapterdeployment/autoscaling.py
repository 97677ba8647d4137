"""Scale an AdapterDeployment: the demand that gateways report, the autoscaler and the disruption budget."""

import asyncio

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.contracts.gateway import DEMAND_COMPONENT, DEMAND_CONFIGMAP, Demand
from graft.kube import FIELD_MANAGER, KubeError, Manifest
from graft.manifests.metadata import COMPONENT, OWNER_UID
from graft.manifests.scaling import (
    autoscaler,
    can_have_several,
    disruption_budget,
    let_go_patch,
    needs_prometheus,
    replicas_patch,
)
from graft.manifests.serving import serving_name
from graft.reconcile.adapterdeployment import scaling
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import Context
from graft.status import now

SCALER = "graft-scaling"  # the field manager that owns spec.replicas while an autoscaler may change it
KEPT_SECONDS = 3600  # seconds beyond idleSeconds for which an entry of a gateway stays in graft-demand
NO_PROMETHEUS = Trouble(
    "PrometheusMissing",
    "spec.autoscaling.target.requestsPerReplica with provider keda needs a Prometheus. Ask your platform team to set "
    "autoscaling.prometheusUrl in the values of Graft's chart, or set spec.autoscaling.provider to hpa. Until then the number "
    "of replicas stays as it is",
)
KINDS = ("PodDisruptionBudget", "HorizontalPodAutoscaler", "ScaledObject")


async def decide(
    ctx: Context, spec: AdapterDeployment, sizing: ServingSizing | None, live: Manifest | None
) -> scaling.Decision:
    """Return how many replicas the deployment must have now."""
    autoscaling = spec.spec.autoscaling
    current = None if live is None else int(live["spec"].get("replicas", 1))
    if autoscaling is None:
        return scaling.Decision(spec.spec.replicas, change=current != spec.spec.replicas)
    sleeps = scaling.may_sleep(spec, sizing)
    return scaling.decide(
        autoscaling,
        sleeps=sleeps,
        stopped=spec.spec.replicas == 0,
        live=current,
        idle=await _idle(ctx, spec, autoscaling.idle_seconds) if sleeps else None,
        steady=0.0 if live is None else scaling.steady_seconds(live),
    )


async def _idle(ctx: Context, spec: AdapterDeployment, idle_seconds: int) -> float | None:
    """Return the seconds since the last request, or None if none is known.

    Also create the ConfigMap for the gateways, and remove old entries from it.
    """
    found = await ctx.kube.get("ConfigMap", ctx.settings.namespace, DEMAND_CONFIGMAP)
    if found is None:
        metadata = {
            "name": DEMAND_CONFIGMAP,
            "namespace": ctx.settings.namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: DEMAND_COMPONENT},
        }
        await ctx.kube.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
        return None
    own = _own(found, spec)
    old = {
        key: demand
        for key, demand in own.items()
        if (scaling.idle_seconds([demand]) or 0) > idle_seconds + KEPT_SECONDS
    }
    await _forget(ctx, list(old))
    return scaling.idle_seconds(demand for key, demand in own.items() if key not in old)


def _own(found: Manifest, spec: AdapterDeployment) -> dict[str, Demand]:
    meta = spec.metadata
    return {
        key: demand
        for key, demand in scaling.demands(found.get("data") or {}).items()
        if (demand.namespace, demand.deployment) == (meta.namespace, meta.name)
    }


async def _forget(ctx: Context, keys: list[str]) -> None:
    if keys:
        patch = {"data": dict.fromkeys(sorted(keys))}
        await ctx.kube.merge_patch("ConfigMap", ctx.settings.namespace, DEMAND_CONFIGMAP, patch)


async def forget(ctx: Context, spec: AdapterDeployment) -> None:
    """Remove the entries of a deleted deployment from graft-demand."""
    found = await ctx.kube.get("ConfigMap", ctx.settings.namespace, DEMAND_CONFIGMAP)
    await _forget(ctx, list(_own(found, spec)) if found is not None else [])


def replicas_to_apply(spec: AdapterDeployment, decision: scaling.Decision, live: Manifest | None) -> int | None:
    """Return spec.replicas of the Deployment's manifest. With autoscaling it is None once the Deployment exists."""
    return None if spec.spec.autoscaling is not None and live is not None else decision.replicas


async def scale(ctx: Context, spec: AdapterDeployment, decision: scaling.Decision, live: Manifest) -> None:
    """Apply the decided number of replicas with a field manager of its own.

    The caller then applies the operator's manifest, which gives up or claims the field. The order matters: if the only
    manager of a field leaves it out, the field falls back to its default.
    """
    claimed, held = _claims_replicas(live, FIELD_MANAGER), _claims_replicas(live, SCALER)
    if spec.spec.autoscaling is None:
        if claimed and held:
            await ctx.kube.apply(let_go_patch(spec), manager=SCALER)
        return
    # While the deployment has another problem, the manifest keeps its claim. So write once, not at each reconcile.
    if decision.change or (claimed and not held):
        await ctx.kube.apply(replicas_patch(spec, decision.replicas, now()), manager=SCALER)


def _claims_replicas(live: Manifest, manager: str) -> bool:
    return any(
        "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in live["metadata"].get("managedFields", [])
        if entry["manager"] == manager and entry["operation"] == "Apply"
    )


async def apply_guards(ctx: Context, spec: AdapterDeployment) -> Trouble | None:
    """Create the disruption budget and the autoscaler, or delete them if they are no longer wanted."""
    wanted = [disruption_budget(spec)] if can_have_several(spec) else []
    prometheus = ctx.settings.prometheus_url
    blind = needs_prometheus(spec) and not prometheus
    moving = None if blind else autoscaler(spec, prometheus)
    wanted += [moving] if moving is not None else []
    by_kind = {manifest["kind"]: manifest for manifest in wanted}
    troubles = await asyncio.gather(*(_guard(ctx, spec, kind, by_kind.get(kind)) for kind in KINDS))
    return next((trouble for trouble in troubles if trouble is not None), NO_PROMETHEUS if blind else None)


async def _guard(ctx: Context, spec: AdapterDeployment, kind: str, manifest: Manifest | None) -> Trouble | None:
    if manifest is None:
        await _remove(ctx, spec, kind)
        return None
    try:
        await ctx.kube.ensure(manifest)
    except KubeError as error:
        if kind != "ScaledObject" or error.status != 404:
            raise
        return Trouble(
            "AutoscalerMissing",
            "the cluster has no kind ScaledObject (keda.sh/v1alpha1). Install KEDA, or set spec.autoscaling.provider to hpa. "
            "Until then the number of replicas stays as it is",
        )
    return None


async def _remove(ctx: Context, spec: AdapterDeployment, kind: str) -> None:
    found = await ctx.cache.get(kind, spec.metadata.namespace, serving_name(spec))
    if found is not None and found["metadata"].get("labels", {}).get(OWNER_UID) == spec.metadata.uid:
        await ctx.kube.delete(kind, spec.metadata.namespace, serving_name(spec), found["metadata"]["uid"])
