"""Delete the routes of AdapterDeployments that no longer exist.

The finalizer deletes the routes before a deployment goes. But everybody who may edit a deployment can remove its
finalizer. Routes that stay would lead to addresses that other pods get later. It does not know the gateway.
"""

import logging

from graft.api.meta import Resource
from graft.contracts.gateway import ROUTES_COMPONENT
from graft.kube import KubeError, Manifest
from graft.manifests.metadata import COMPONENT, OWNER_UID
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.ending import delete_routes

log = logging.getLogger(__name__)


async def deleted(ctx: Context, body: Manifest) -> None:
    """Delete the routes of one deployment that was deleted. If this fails, the housekeeping does it later."""
    resource = Resource.model_validate(body)
    try:
        await delete_routes(ctx, resource)
    except KubeError as error:
        log.warning("cannot delete the routes of a deleted AdapterDeployment, the housekeeping retries: %s", error)


async def sweep(ctx: Context) -> None:
    """Delete all routes whose deployment does not exist. Raises KubeError."""
    # The routes are listed first: those of a deployment that is created meanwhile must not count as orphans.
    labels = {COMPONENT: ROUTES_COMPONENT}
    routes = await ctx.kube.list("ConfigMap", ctx.settings.namespace, labels, metadata_only=True)
    there = {item["metadata"]["uid"] for item in await ctx.kube.list("AdapterDeployment", metadata_only=True)}
    for item in routes:
        if (owner := _owner(item)) is not None and owner not in there:
            await _delete(ctx, item)


def _owner(config_map: Manifest) -> str | None:
    found = (config_map["metadata"].get("labels") or {}).get(OWNER_UID)
    return None if found is None else str(found)


async def _delete(ctx: Context, config_map: Manifest) -> None:
    meta = config_map["metadata"]
    log.info("routes without a deployment are deleted", extra={"configmap": meta["name"]})
    await ctx.kube.delete("ConfigMap", ctx.settings.namespace, meta["name"], meta["uid"])
