"""Reconcile a Tenant: find its namespaces, and keep in each of them what the spec says.

It does not know what happens in a namespace. Jobs and deployments are those of their own reconciles.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from graft.api import Tenant
from graft.api.meta import Condition
from graft.api.tenant import TenantStatus
from graft.artifacts.storage import StoreError
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError, Manifest
from graft.manifests.metadata import OWNER_UID
from graft.manifests.tenant import POD_SECURITY, children, default_account
from graft.reconcile.claims import Claim, Space, claim_of, holder, space_of, why_never
from graft.reconcile.shared import storerights
from graft.reconcile.shared.access import Trouble, record_part, refusal_of
from graft.reconcile.shared.context import WAITING, Context
from graft.status import condition
from graft.work.together import together

KIND = "Tenant"
CHILDREN = ("RoleBinding", "NetworkPolicy")
RECHECK = 300.0  # seconds until the namespaces of a complete Tenant are checked again
STORE = ""  # of a trouble that belongs to no namespace
AT_ONCE = 8  # namespaces whose objects are written at the same time
NAMED = 5  # namespaces that a message names
INVALID = 422  # status of a write that would change the role of a RoleBinding, or add a second controller
Value = TypeVar("Value")


@dataclass
class Share:
    """The namespaces of one Tenant, and those that it asks for and does not have."""

    has: dict[str, Space] = field(default_factory=dict)  # by name
    claimed: dict[str, str] = field(default_factory=dict)  # namespace -> the Tenant that has it
    missing: list[str] = field(default_factory=list)
    reserved: dict[str, str] = field(default_factory=dict)  # namespace -> why it can belong to no Tenant


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one Tenant. Return the seconds until the next reconcile, or None if it does not exist."""
    raw = await ctx.cache.get(KIND, None, name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        return None
    tenant = Tenant.model_validate(raw)
    share, troubles = Share(), dict[str, Trouble]()
    if ctx.settings.tenants_enabled:
        share = await gather_share(ctx, tenant)
        if (stored := await _limit_models(ctx)) is not None:
            troubles[STORE] = stored
        troubles |= await _keep(ctx, tenant, share.has)
    troubles = await _remove_others(ctx, tenant, share.has) | troubles
    status, observed = observe(tenant, share, troubles, enabled=ctx.settings.tenants_enabled)
    await ctx.write_status(raw, status, observed)
    return RECHECK if observed[0].status == "True" else WAITING


async def _limit_models(ctx: Context) -> Trouble | None:
    """Let the store enforce spec.baseModels. Return why that is not possible now."""
    try:
        await storerights.allow_models(ctx)
    except StoreError as error:
        return Trouble("StorageUnavailable", f"cannot set the rights on base models, the operator retries: {error}")
    return None


async def gather_share(ctx: Context, tenant: Tenant) -> Share:
    """Read all namespaces and Tenants. Return which namespaces a Tenant has."""
    spaces = await ctx.cache.every("Namespace", space_of)
    claims = await ctx.cache.every(KIND, claim_of)
    return share_of(tenant.metadata.name, claims, spaces, ctx.settings.namespace)


def share_of(name: str, claims: Iterable[Claim], spaces: Iterable[Space], operator_namespace: str) -> Share:
    """Return which namespaces a Tenant has (PURE)."""
    claims = list(claims)
    own = next((item for item in claims if item.tenant == name), None)
    share, there = Share(), {item.name: item for item in spaces}
    if own is None:
        return share
    for namespace in sorted(own.names):
        if (why := why_never(namespace, operator_namespace)) is not None:
            share.reserved[namespace] = why
        elif namespace not in there:
            share.missing.append(namespace)
    for namespace, space in sorted(there.items()):
        if space.leaving or not own.covers(namespace, space.labels):
            continue
        has = holder(claims, namespace, space.labels, operator_namespace)
        if has == own:
            share.has[namespace] = space
        elif has is not None:
            share.claimed[namespace] = has.tenant
    return share


async def _keep(ctx: Context, tenant: Tenant, namespaces: Mapping[str, Space]) -> dict[str, Trouble]:
    """Make sure that every namespace has what the spec says. Return what is refused, by namespace."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(namespace: str) -> Trouble | None:
        async with limit:
            return await _keep_one(ctx, tenant, namespaces[namespace])

    # An error is raised after all others have ended: a namespace does not hold up another.
    pairs = zip(namespaces, await together(*map(one, namespaces)), strict=True)
    return {namespace: trouble for namespace, trouble in pairs if trouble is not None}


async def _keep_one(ctx: Context, tenant: Tenant, space: Space) -> Trouble | None:
    """Make sure that a namespace is isolated, and then that the members have their rights. Return what is refused."""
    namespace = space.name
    what = f"the labels of namespace {namespace}"
    try:
        await _secure(ctx, space)
        what = f"Secret {STORAGE_SECRET} in namespace {namespace}"
        inherit = namespace in (tenant.spec.namespaces.inherit or ())
        taken = await record_part(ctx, tenant.metadata.name, namespace, space.uid, inherit=inherit)
        what = f"ServiceAccount default in namespace {namespace}"
        await _disarm(ctx, namespace)
        for manifest in children(tenant, namespace, ctx.settings.member_cluster_roles):
            what = f"{manifest['kind']} {manifest['metadata']['name']} in namespace {namespace}"
            await _ensure(ctx, tenant, manifest)
    except StoreError as error:
        text = f"cannot record the part of the bucket of namespace {namespace}, the operator retries: {error}"
        return Trouble("StorageUnavailable", text)
    except KubeError as error:
        if error.status == 409:
            raise
        if (refused := refusal_of(ctx, namespace, what, error)) is None:
            raise
        return refused
    return taken


async def _secure(ctx: Context, space: Space) -> None:
    """Set Pod Security. The labels of the cache may be older than another writer's: the next event tells."""
    if not POD_SECURITY.items() <= space.labels.items():
        patch = {"metadata": {"labels": dict(POD_SECURITY), "uid": space.uid}}
        await ctx.kube.merge_patch("Namespace", None, space.name, patch)


async def _disarm(ctx: Context, namespace: str) -> None:
    """Let the default service account give pods no token. It is read, because it is no child that the cache follows."""
    live = await ctx.kube.get("ServiceAccount", namespace, "default")
    if live is None or live.get("automountServiceAccountToken") is not False:
        await ctx.kube.apply(default_account(namespace))


async def _ensure(ctx: Context, tenant: Tenant, manifest: Manifest) -> None:
    """Apply an object. One of ours that cannot be changed back is made anew: a RoleBinding with another role, or an object
    of a deleted Tenant of the same name."""
    try:
        await ctx.kube.ensure(manifest)
    except KubeError as error:
        if error.status != INVALID:
            raise
        kind, namespace, name = manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        live = await ctx.kube.get(kind, namespace, name)
        if live is None or not _is_ours(live, tenant.metadata.name):
            raise
        await ctx.kube.delete(kind, namespace, name, live["metadata"]["uid"])
        await ctx.kube.ensure(manifest)


def _is_ours(live: Manifest, tenant: str) -> bool:
    """Return whether the controller of an object is the Tenant of this name, or one before it (PURE)."""
    references = live["metadata"].get("ownerReferences") or []
    return any(
        (item.get("controller"), item.get("kind"), item.get("name")) == (True, KIND, tenant) for item in references
    )


async def _remove_others(ctx: Context, tenant: Tenant, namespaces: Iterable[str]) -> dict[str, Trouble]:
    """Delete the children that the spec no longer asks for: of namespaces and roles that have left.

    Return what is refused, by namespace. A namespace that is not bound any more holds up no other.
    """
    roles = ctx.settings.member_cluster_roles
    wanted = {
        (item["kind"], namespace, item["metadata"]["name"])
        for namespace in namespaces
        for item in children(tenant, namespace, roles)
    }
    uid, troubles = tenant.metadata.uid, dict[str, Trouble]()
    for kind in CHILDREN:
        for item in await ctx.cache.list(kind, labels={OWNER_UID: uid}, owner=uid, metadata_only=True):
            namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
            if (kind, namespace, name) in wanted:
                continue
            try:
                await ctx.kube.delete(kind, namespace, name, item["metadata"]["uid"])
            except KubeError as error:
                if (refused := refusal_of(ctx, namespace, f"{kind} {name}", error)) is None:
                    raise
                troubles[namespace] = refused
    return troubles


def observe(
    tenant: Tenant, share: Share, troubles: Mapping[str, Trouble], *, enabled: bool = True
) -> tuple[TenantStatus, list[Condition]]:
    """Return the status of a Tenant (PURE). The first of several problems gives the reason, and the message has all."""
    status = tenant.status.model_copy(update={"namespaces": list(share.has)})
    if not enabled:
        text = "the operator has no rights for Tenants, so this Tenant has no effect. Set tenants.enabled: true in the chart's values"
        return _with_stage(status, "Incomplete"), [condition(KIND, "Ready", "False", "TenantsDisabled", text)]
    found: list[tuple[str, str]] = []
    for namespace, why in _some(share.reserved):
        found.append(
            (
                "NamespaceReserved",
                f"namespace {namespace} cannot belong to a Tenant: {why}. Remove it from spec.namespaces.names",
            )
        )
    for namespace, other in _some(share.claimed):
        found.append(
            (
                "NamespaceClaimed",
                f"namespace {namespace} belongs to Tenant {other}, which is older. Take it out of spec.namespaces of one of "
                f"the two Tenants",
            )
        )
    for _, trouble in _some(dict(troubles)):
        found.append((trouble.reason, trouble.message))
    if share.missing:
        names = ", ".join(share.missing[:NAMED])
        found.append(("NamespaceMissing", f"namespace {names} (spec.namespaces.names) does not exist yet. Create it"))
    if not found:
        count = len(share.has)
        text = f"{count} namespace{'' if count == 1 else 's'}, {len(tenant.spec.members or [])} members"
        return _with_stage(status, "Ready"), [condition(KIND, "Ready", "True", "AsExpected", text)]
    reason = found[0][0]
    # What others still have to do is waited for. What contradicts the spec is not.
    waits = reason in {"NamespaceMissing", "NamespaceNotBound", "StorageUnavailable"}
    message = ". ".join(text for _, text in found)
    observed = condition(KIND, "Ready", "Unknown" if waits else "False", reason, message)
    return _with_stage(status, "Waiting" if waits else "Incomplete"), [observed]


def _some(found: Mapping[str, Value]) -> list[tuple[str, Value]]:
    return sorted(found.items(), key=lambda item: item[0])[:NAMED]


def _with_stage(status: TenantStatus, stage: str) -> TenantStatus:
    return status.model_copy(update={"stage": stage})
