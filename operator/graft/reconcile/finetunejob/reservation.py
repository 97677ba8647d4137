"""Reserve the version that a FineTuneJob publishes.

Two jobs of one adapter never get the same number, and a number that is published is not used again. The status of a job
is its reservation. As long as a new job has no status, annotations are: they are written together with its finalizer.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from graft.api import FineTuneJob
from graft.api.finetunejob import Resolved, Sizing
from graft.contracts.message import BaseModelRef
from graft.kube import KubeError, Manifest
from graft.reconcile.adapter import versions
from graft.reconcile.adapter.facts import VersionFacts, adapter_label, version_of
from graft.reconcile.finetunejob.facts import (
    CLAIMED_RECIPE,
    CLAIMED_VERSION,
    JobFacts,
    claimed_version,
    facts_of,
    output_adapter,
)
from graft.reconcile.finetunejob.jobstatus import KIND, NO_POD, plan_of
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import Context
from graft.status import condition

Write: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Needed:
    """What the pods of a job need, written while the version is reserved. No pod reads it before the Job exists."""

    def __init__(self, put: Callable[[str], Coroutine[Any, Any, Trouble | None]]) -> None:
        """`put` writes it for a version. It returns what is missing in the namespace."""
        self._put = put
        self._task: asyncio.Task[Trouble | None] | None = None

    def begin(self, version: str) -> None:
        self._task = asyncio.create_task(self._put(version), name="what pods need")

    async def written(self) -> Trouble | None:
        """Wait until it is written. Return what is missing in the namespace, or None. Raises KubeError."""
        return None if self._task is None else await self._task

    @asynccontextmanager
    async def or_stopped(self) -> AsyncIterator[None]:
        """Let nothing be written any more when the block has failed: the next attempt may choose another version."""
        try:
            yield
        except BaseException as error:
            if self._task is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._task.cancel()
                await asyncio.wait([self._task])
            raise


async def reserve_version(
    ctx: Context,
    raw: Manifest,
    job: FineTuneJob,
    base_model: BaseModelRef,
    sizing: Sizing | None,
    chosen: Callable[[str], None] = lambda version: None,
) -> str | Trouble:
    """Return the version that this job publishes. It is written to the status before a pod uses it.

    `chosen` is called with the version before it is written.
    """
    resolved = job.status.resolved
    if resolved is not None and resolved.version is not None and not await _taken(ctx, job, resolved.version):
        chosen(resolved.version)
        if sizing != job.status.sizing:  # the lengths of the data are known by now, or the nodes have changed
            status = job.status.model_copy(update={"sizing": sizing})
            await ctx.write_status(raw, status, job.status.conditions)
        return resolved.version
    claimed = claimed_version(job.metadata.annotations, recorded=bool(raw.get("status")))
    version = await _choose(ctx, job, claimed)
    if not isinstance(version, Trouble):
        chosen(version)
        await _record(ctx, raw, job, base_model, version, sizing)
    return version


async def claim_version(
    ctx: Context,
    raw: Manifest,
    job: FineTuneJob,
    base_model: BaseModelRef,
    sizing: Sizing | None,
    labels: dict[str, str],
    chosen: Callable[[str], None],
) -> Write | Trouble:
    """Reserve the version of a new job by the write that sets its finalizer and these labels.

    So its Job may be created after one write of the FineTuneJob. Return the write of its status, which may be made at
    the same time. `chosen` is called with the version before it is written.
    """
    version = await _choose(ctx, job)
    if isinstance(version, Trouble):
        return version
    chosen(version)
    claimed = await ctx.claim(raw, labels, {CLAIMED_VERSION: version, CLAIMED_RECIPE: versions.recipe(job.spec)})
    if claimed is None:
        raise KubeError(404, "NotFound", f"{KIND} {job.metadata.name} was deleted before its start")
    return lambda: _record(ctx, claimed, job, base_model, version, sizing)


async def _record(
    ctx: Context, raw: Manifest, job: FineTuneJob, base_model: BaseModelRef, version: str, sizing: Sizing | None
) -> None:
    """Write the version that a job publishes to its status. Raises KubeError if the job has changed since it was read."""
    reserved = Resolved(
        version=version,
        recipe=versions.recipe(job.spec),
        base_model_uri=base_model.uri,
        base_model_digest=base_model.digest or base_model.uri,
    )
    update = {"resolved": reserved, "sizing": sizing, "stage": "Pending", "restarts": job.spec.restarts}
    status = job.status.model_copy(update=update)
    observed = [
        condition(KIND, "Accepted", "True", "Resolved", plan_of(job, reserved)),
        # As long as the Job has no pod, nothing else is to say. So the next write is that of a change.
        condition(KIND, "Succeeded", "Unknown", "Pending", NO_POD),
    ]
    # Only for the job that was read: no pod may use a version that its status does not have.
    await ctx.write_status(raw, status, observed, unchanged=True)


async def _choose(ctx: Context, job: FineTuneJob, claimed: str | None = None) -> str | Trouble:
    """Return a version that no other job has reserved, and that is not published. `claimed`: by an operator that was
    stopped before it wrote the status."""
    known = await _known_versions(ctx, job)
    version = job.spec.output.version
    if version == "auto":
        known += await _stored_versions(ctx, job)
        if claimed is not None and all(item.version != claimed for item in known):
            return claimed
        return versions.next_version(known, versions.recipe(job.spec), job.spec.base_model)
    if any(item.version == version and item.base_model is not None for item in known):
        adapter = job.spec.output.adapter
        return Trouble(
            "VersionExists",
            f"version {version} of {adapter} is already published, or another job has reserved it. Create the job again with "
            "another spec.output.version, or with auto",
        )
    return version


async def _taken(ctx: Context, job: FineTuneJob, version: str) -> bool:
    """Return whether another job has reserved the version, too.

    The last write of a former leader can arrive after its successor has reserved the version for another job. This
    job has not started with that version yet, so it reserves another one.
    """
    if not ctx.elected:
        return False
    return any(item.version == version for item in await _reserved_versions(ctx, job))


async def _known_versions(ctx: Context, job: FineTuneJob) -> list[versions.Known]:
    """Return the versions of the adapter that are published, or reserved by another job."""
    namespace, adapter = job.metadata.namespace, job.spec.output.adapter
    known: list[VersionFacts] = await ctx.cache.facts("Adapter", namespace, adapter, adapter_label, version_of)
    return [item.known for item in known] + await _reserved_versions(ctx, job)


async def _reserved_versions(ctx: Context, job: FineTuneJob) -> list[versions.Known]:
    """Return the versions of the adapter that other jobs have reserved or published."""
    namespace, adapter = job.metadata.namespace, job.spec.output.adapter
    others: list[JobFacts] = await ctx.cache.facts(KIND, namespace, adapter, output_adapter, facts_of)
    return [item.reserves for item in others if item.uid != job.metadata.uid and item.reserves is not None]


async def _stored_versions(ctx: Context, job: FineTuneJob) -> list[versions.Known]:
    """Return the versions of the adapter that have files in the bucket. Raises StoreError."""
    namespace = job.metadata.namespace
    stored = await ctx.stored(namespace, ctx.folders.versions, namespace, job.spec.output.adapter)
    return [versions.Known(version, None, None) for version in stored if versions.parse(version)]
