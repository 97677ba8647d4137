"""Delete what gateways read of AdapterDeployments and ApiKeys that no longer exist: routes and grants.

The finalizer deletes them before the resource goes. But everybody who may edit a resource can remove its finalizer. Routes
that stay would lead to addresses that other pods get later, and a grant that stays would open models to a key that was
revoked. It does not know the gateway.
"""

import logging

from graft.api.meta import Resource
from graft.contracts.apikeys import API_KEY_COMPONENT
from graft.contracts.gateway import ROUTES_COMPONENT
from graft.kube import KubeError, Manifest
from graft.manifests.metadata import COMPONENT, OWNER_UID
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.ending import WITHDRAW

log = logging.getLogger(__name__)

KINDS = {"AdapterDeployment": ROUTES_COMPONENT, "ApiKey": API_KEY_COMPONENT}  # the component of their ConfigMaps


async def deleted(ctx: Context, kind: str, body: Manifest) -> None:
    """Delete what gateways read of one resource that was deleted. If this fails, the housekeeping does it later."""
    try:
        await WITHDRAW[kind](ctx, Resource.model_validate(body))
    except KubeError as error:
        log.warning("cannot delete what gateways know of a deleted %s, the housekeeping retries: %s", kind, error)


async def sweep(ctx: Context) -> None:
    """Delete all routes and grants whose resource does not exist. Raises KubeError."""
    for kind, component in KINDS.items():
        # The ConfigMaps are listed first: one whose resource is created meanwhile must not count as an orphan.
        found = await ctx.kube.list("ConfigMap", ctx.settings.namespace, {COMPONENT: component}, metadata_only=True)
        try:
            there = {item["metadata"]["uid"] for item in await ctx.kube.list(kind, metadata_only=True)}
        except KubeError as error:
            if error.status != 404:
                raise
            continue  # the CustomResourceDefinitions are of a release that lacks the kind
        for item in found:
            if (owner := _owner(item)) is not None and owner not in there:
                await _delete(ctx, kind, item)


def _owner(config_map: Manifest) -> str | None:
    found = (config_map["metadata"].get("labels") or {}).get(OWNER_UID)
    return None if found is None else str(found)


async def _delete(ctx: Context, kind: str, config_map: Manifest) -> None:
    meta = config_map["metadata"]
    log.info("a ConfigMap for gateways without its %s is deleted", kind, extra={"configmap": meta["name"]})
    await ctx.kube.delete("ConfigMap", ctx.settings.namespace, meta["name"], meta["uid"])
