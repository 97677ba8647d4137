"""Set the rights of the tenants' keys on base models: the store enforces spec.allowedNamespaces of the BaseModels and
spec.baseModels of the Tenants, too.

The module also names this installation of Graft, because several installations may use one store. It does not issue
keys.
"""

import logging
from collections.abc import Callable, Collection, Iterable

from graft.artifacts import layout
from graft.artifacts.identity import AllBut, Readers, VersityIdentity
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.kube import Kube, KubeError, Manifest
from graft.reconcile.claims import Claim, claim_of, holders, space_of
from graft.reconcile.shared.context import Context
from graft.settings import Settings

log = logging.getLogger(__name__)

SYSTEM = "kube-system"  # its UID identifies a cluster: nobody deletes it
WILD = set("*?$")  # wildcards in the resources of a policy


async def open_identity(kube: Kube, settings: Settings, store: S3Store) -> VersityIdentity | None:
    """Return the store's identity service as this installation uses it. None if the platform team creates the keys."""
    if not settings.storage.issue_credentials:
        return None
    found = await kube.get("Namespace", None, SYSTEM)
    cluster = found["metadata"]["uid"] if found is not None else ""
    address = settings.storage.admin_url or store.config.endpoint
    return VersityIdentity(store, address, installation_name(cluster, settings.namespace), models=None)


def installation_name(cluster: str, namespace: str) -> str:
    """Return the name of an installation: the UID of its cluster's kube-system, and the operator's namespace (PURE)."""
    return f"{cluster}/{namespace}"


def readers(
    models: Iterable[Manifest], bucket: str, forbidden: Callable[[str], Collection[str]] = lambda model: ()
) -> Readers:
    """Return which tenants may read which prefix below models/ (PURE).

    `forbidden`: name of a BaseModel -> the namespaces whose Tenant may not use it. If several BaseModels name the same folder, the namespaces of all of them may read it. Folders outside of models/ are
    left out: a BaseModel gives no key a right on a tenant's part.
    """
    found: dict[str, Collection[str] | AllBut] = {}
    for model in models:
        prefix = folder_of(str(model["spec"]["source"]), bucket)
        if prefix is None:
            continue
        allowed = model["spec"].get("allowedNamespaces")
        denied = frozenset(map(layout.tenant_of, forbidden(model["metadata"]["name"])))
        mine = AllBut(denied) if allowed is None else sorted({*map(layout.tenant_of, allowed)} - denied)
        found[prefix] = _either(found[prefix], mine) if prefix in found else mine
    return found


def _either(one: Collection[str] | AllBut, other: Collection[str] | AllBut) -> Collection[str] | AllBut:
    """Return the tenants of both."""
    if isinstance(one, AllBut):
        return AllBut(one.tenants & other.tenants if isinstance(other, AllBut) else one.tenants - {*other})
    return AllBut(other.tenants - {*one}) if isinstance(other, AllBut) else sorted({*one, *other})


def folder_of(source: str, bucket: str) -> str | None:
    """Return the prefix of an s3:// source in a folder of models/ of this bucket, else None.

    The source models/ itself gives None, because it holds all models.
    """
    try:
        found, key = layout.split_s3_uri(source)
    except ValueError:
        return None
    prefix = key.rstrip("/") + "/"
    inside = (
        prefix.startswith(layout.MODELS_PREFIX)
        and prefix != layout.MODELS_PREFIX
        and not {"", ".", ".."} & set(prefix.rstrip("/").split("/"))
    )
    return prefix if found == bucket and inside and not WILD & set(prefix) else None


async def allow_models(ctx: Context) -> None:
    """Give the tenants' keys the rights that the BaseModels and the Tenants say now. Raises StoreError."""
    if ctx.identity is None:
        return
    async with ctx.locks.hold("models"):  # an older list must not be written after a newer one
        limited = await _limited(ctx)
        models = readers(
            await ctx.kube.list("BaseModel"),
            ctx.store.config.bucket,
            lambda model: [name for name, claim in limited.items() if not claim.lets_use(model)],
        )
        await ctx.store_calls.run("", ctx.identity.allow, models)


async def _limited(ctx: Context) -> dict[str, Claim]:
    """Return the namespaces whose Tenant may use only some base models, with their Tenants."""
    claims = await ctx.cache.every("Tenant", claim_of) if ctx.settings.tenants_enabled else []
    if all(claim.base_models is None for claim in claims):
        return {}
    held = holders(claims, await ctx.cache.every("Namespace", space_of), ctx.settings.namespace)
    return {name: claim for name, claim in held.items() if claim.base_models is not None}


async def deleted(ctx: Context) -> None:
    """Correct the rights after a BaseModel or a Tenant was deleted. If the store does not answer, housekeeping does it
    later."""
    try:
        await allow_models(ctx)
    except (StoreError, KubeError) as error:
        log.warning("cannot correct the rights on base models after a deletion, the operator retries: %s", error)
