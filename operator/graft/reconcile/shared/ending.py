"""Stop the Jobs and the routes of a resource. Its pods end before their files are deleted, so that no pod still writes."""

from collections.abc import Callable, Sequence

from graft.api.meta import Resource
from graft.artifacts import layout
from graft.artifacts.archive import Interrupted
from graft.artifacts.store import S3Store
from graft.kube import KubeError
from graft.manifests.apikeys import grant_name
from graft.manifests.metadata import OWNER_UID
from graft.manifests.routes import routes_name
from graft.reconcile.shared.access import Trouble, not_bound
from graft.reconcile.shared.context import SOON, Context
from graft.reconcile.shared.ownership import is_pod_of

DELETE = "delete"  # the kind of transfer


async def stop(ctx: Context, resource: Resource) -> float | Trouble | None:
    """Delete the Jobs of a resource, then its folder under runs/.

    Return the seconds until the next reconcile, why the Jobs cannot be deleted, or None when all is deleted. Raises
    StoreError.
    """
    left = await end_jobs(ctx, resource)
    if left is not None:
        return left
    tenant = layout.tenant_of(resource.metadata.namespace)
    return delete(ctx, resource, [layout.run_prefix(tenant, resource.metadata.uid)])


def delete(ctx: Context, resource: Resource, prefixes: Sequence[str]) -> float | None:
    """Delete the files below these prefixes as a transfer, because a tenant decides how many they are.

    Return the seconds until the next reconcile, or None when they are deleted and nothing else is written for the
    resource. Raises StoreError.
    """
    uid = resource.metadata.uid
    if not prefixes and not ctx.transfers.has(uid, DELETE):
        return None if ctx.transfers.forget(uid) else SOON
    # After an interruption files may be left, so the next reconcile starts again.
    deleted = ctx.transfer(resource, DELETE, _delete, ctx.store, list(prefixes))
    if deleted is None:
        return SOON
    deleted.result()
    return None


def _delete(store: S3Store, prefixes: Sequence[str], stopped: Callable[[], bool]) -> None:
    for prefix in prefixes:
        store.delete_prefix(prefix, stopped)
        if stopped():
            raise Interrupted


async def delete_routes(ctx: Context, deployment: Resource) -> None:
    """Delete the routes of an AdapterDeployment, and not those of one that was created again under its name."""
    await _withdraw(ctx, routes_name(deployment), deployment.metadata.uid)


async def delete_grant(ctx: Context, api_key: Resource) -> None:
    """Delete what the gateways know of an ApiKey, so that they refuse its keys."""
    await _withdraw(ctx, grant_name(api_key), api_key.metadata.uid)


# Kinds whose resources gateways know of, and how that is deleted.
WITHDRAW = {"AdapterDeployment": delete_routes, "ApiKey": delete_grant}


async def _withdraw(ctx: Context, name: str, owner: str) -> None:
    """Delete a ConfigMap that gateways read, if it belongs to the resource with the UID `owner`."""
    found = await ctx.kube.get("ConfigMap", ctx.settings.namespace, name)
    if found is not None and (found["metadata"].get("labels") or {}).get(OWNER_UID) == owner:
        await ctx.kube.delete("ConfigMap", ctx.settings.namespace, found["metadata"]["name"], found["metadata"]["uid"])


async def end_jobs(ctx: Context, resource: Resource) -> float | Trouble | None:
    """Delete the Jobs of a resource with their pods.

    Return the seconds until the next reconcile, why that is impossible, or None.
    """
    namespace, labels = resource.metadata.namespace, {OWNER_UID: resource.metadata.uid}
    for child in await ctx.cache.fresh("Job", namespace, labels, owner=resource.metadata.uid):
        if child["metadata"].get("deletionTimestamp"):
            continue
        try:
            await ctx.kube.delete("Job", namespace, child["metadata"]["name"], child["metadata"]["uid"], "Foreground")
        except KubeError as error:
            if error.status != 403:
                raise
            # The RoleBinding was deleted. This also happens while a namespace is deleted, if it loses the RoleBinding
            # before the Job.
            return Trouble("NamespaceNotBound", not_bound(ctx, namespace))
    pods = await ctx.cache.fresh("Pod", namespace, labels, metadata_only=True)
    if any(is_pod_of(pod, resource.metadata.name) for pod in pods):
        return SOON
    left = await ctx.cache.fresh("Job", namespace, labels, owner=resource.metadata.uid, metadata_only=True)
    return SOON if left else None
