"""Set the rights of the tenants' keys on base models: the store enforces spec.allowedNamespaces of the BaseModels, too.

The module also names this installation of Graft, because several installations may use one store. It does not issue
keys.
"""

import logging
from collections.abc import Collection, Iterable

from graft.artifacts import layout
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.kube import Kube, KubeError, Manifest
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


def readers(models: Iterable[Manifest], bucket: str) -> dict[str, Collection[str] | None]:
    """Return which tenants may read which prefix below models/: prefix -> tenants; None: all of them (PURE).

    If several BaseModels name the same folder, the namespaces of all of them may read it. Folders outside of models/ are
    left out: a BaseModel gives no key a right on a tenant's part.
    """
    found: dict[str, Collection[str] | None] = {}
    for model in models:
        prefix = folder_of(str(model["spec"]["source"]), bucket)
        if prefix is None:
            continue
        allowed = model["spec"].get("allowedNamespaces")
        before = found.get(prefix, ())
        if allowed is None or before is None:
            found[prefix] = None
        else:
            found[prefix] = sorted({*before, *(layout.tenant_of(name) for name in allowed)})
    return found


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
    """Give the tenants' keys the rights that the BaseModels say now. Raises StoreError."""
    if ctx.identity is None:
        return
    async with ctx.locks.hold("models"):  # an older list must not be written after a newer one
        models = readers(await ctx.kube.list("BaseModel"), ctx.store.config.bucket)
        await ctx.store_calls.run("", ctx.identity.allow, models)


async def model_deleted(ctx: Context) -> None:
    """Remove the rights on a BaseModel that was deleted. If the store does not answer, housekeeping does it later."""
    try:
        await allow_models(ctx)
    except (StoreError, KubeError) as error:
        log.warning("cannot take away the rights on a deleted BaseModel, the operator retries: %s", error)
