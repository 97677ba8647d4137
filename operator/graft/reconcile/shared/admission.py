"""Refuse resources that no reconciler may handle: those of a reserved namespace, and those that the schema refuses.

All kinds pass here before their reconciler runs. It does not know any kind's life cycle.
"""

from collections.abc import Awaitable, Callable

from pydantic import ConfigDict, Field, ValidationError

from graft.api import Adapter, AdapterDeployment, ApiKey, BaseModel, FineTuneJob, Tenant
from graft.api.meta import Condition, Resource, Status
from graft.artifacts.layout import why_reserved
from graft.contracts.message import first_problem
from graft.kube import Manifest
from graft.reconcile.shared import ending
from graft.reconcile.shared.access import Trouble, reserved
from graft.reconcile.shared.context import SOON, WAITING, Context
from graft.status import condition

Reconcile = Callable[[Context, str, str], Awaitable[float | None]]

# kind -> the condition that a refusal sets to False, and the stage.
REFUSED = {
    "BaseModel": ("Ready", "Unavailable"),
    "FineTuneJob": ("Accepted", "Waiting"),
    "Adapter": ("Ready", "Invalid"),
    "AdapterDeployment": ("Accepted", "Waiting"),
    "ApiKey": ("Ready", "Waiting"),
    "Tenant": ("Ready", "Incomplete"),
}
SCHEMAS: dict[str, type[Resource]] = {
    item.__name__: item for item in (BaseModel, FineTuneJob, Adapter, AdapterDeployment, ApiKey, Tenant)
}


class AnyStatus(Status):
    """The status of any kind. It keeps the fields of the kind as they are."""

    model_config = ConfigDict(extra="allow")

    stage: str | None = None
    observed_generation: int | None = None
    conditions: list[Condition] = Field(default_factory=list)


async def admit(ctx: Context, kind: str, reconcile: Reconcile, namespace: str, name: str) -> float | None:
    """Reconcile one resource if it may be reconciled, else write why not. Return the seconds until the next reconcile."""
    why = why_reserved(namespace, ctx.store.config.access_key_id) if namespace else None
    if why is not None:
        raw = await ctx.cache.get(kind, namespace, name)
        return None if raw is None else await _refuse(ctx, kind, raw, reserved(namespace, why))
    try:
        return await reconcile(ctx, namespace, name)
    except ValidationError:
        raw = await ctx.cache.get(kind, namespace or None, name)
        why = None if raw is None else why_invalid(kind, raw)
        if raw is None or why is None:  # this resource is valid: another object that the reconcile read is invalid
            raise
        return await _refuse(ctx, kind, raw, Trouble("SpecInvalid", why))


def why_invalid(kind: str, raw: Manifest) -> str | None:
    """Return which field of a stored resource the schema refuses, without its value, and what to do. None if none (PURE)."""
    try:
        SCHEMAS[kind].model_validate(raw)
    except ValidationError as error:
        return (
            f"the schema of this version of Graft refuses the stored {kind}: {first_problem(error)}. Correct the field. If "
            f"it cannot be changed, delete the resource and create it again"
        )
    return None


async def _refuse(ctx: Context, kind: str, raw: Manifest, trouble: Trouble) -> float | None:
    """Report the trouble. If the resource is being deleted, end its Jobs and routes. Its files stay in storage."""
    resource = Resource.model_validate(raw)
    type_, stage = REFUSED[kind]
    if resource.metadata.deletion_timestamp:
        if kind in ending.WITHDRAW:
            await ending.WITHDRAW[kind](ctx, resource)
        if not ctx.transfers.forget(resource.metadata.uid):
            return SOON
        left = await ending.end_jobs(ctx, resource) if kind in {"FineTuneJob", "Adapter"} else None
        if left is None:
            await ctx.remove_finalizer(resource, kind)
            return None
        if not isinstance(left, Trouble):
            return left
        trouble = left
    status = AnyStatus.model_validate(raw.get("status") or {})
    refusal = condition(kind, type_, "False", trouble.reason, trouble.message)
    others = [item for item in status.conditions if item.type != type_]
    if any(item.type == "Succeeded" and item.status != "Unknown" for item in others):
        return None  # a job that has ended keeps its result
    await ctx.write_status(raw, status.model_copy(update={"stage": stage}), [refusal, *others])
    return WAITING
