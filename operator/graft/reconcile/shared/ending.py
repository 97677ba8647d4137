"""Stop the Jobs of a resource. Its pods end before their files are deleted, so that no pod still writes."""

from graft.api.meta import Resource
from graft.artifacts import layout
from graft.kube import KubeError
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.shared.access import Trouble, not_bound
from graft.reconcile.shared.context import SOON, Context


async def stop(ctx: Context, resource: Resource) -> float | Trouble | None:
    """Delete the Jobs of a resource, then its folder under runs/.

    Return the seconds until the next reconcile, why the Jobs cannot be deleted, or None when all is deleted.
    """
    left = await end_jobs(ctx, resource)
    if left is None:
        tenant = layout.tenant_of(resource.metadata.namespace)
        await ctx.blocking(ctx.store.delete_prefix, layout.run_prefix(tenant, resource.metadata.uid))
    return left


async def end_jobs(ctx: Context, resource: Resource) -> float | Trouble | None:
    """Delete the Jobs of a resource with their pods.

    Return the seconds until the next reconcile, why that is impossible, or None.
    """
    namespace, labels = resource.metadata.namespace, {OWNER_UID: resource.metadata.uid}
    for child in await ctx.kube.list("Job", namespace, labels):
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
    if await ctx.kube.list("Pod", namespace, labels) or await ctx.kube.list("Job", namespace, labels):
        return SOON
    return None
