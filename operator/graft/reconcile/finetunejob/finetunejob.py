"""Reconcile a FineTuneJob.

    wait for the base model and the storage key -> size the job (status.sizing) -> reserve a version (status.resolved)
    -> ConfigMap, NetworkPolicy -> if the job needs GPUs, a preflight Job for the checks that need none, then size it again
    -> Job -> follow the pods and progress.json; suspend, resume, halve the micro-batch
    -> manifest.json in storage -> Adapter -> its verification -> Succeeded -> TTL

Each reconcile finds the current step from what exists: the version in the status, the Job by the label with the
resource's UID, the manifest by its path and the job's UID in it. After a job has ended (Succeeded is True or False),
only two things can happen. It is deleted after its TTL. Or it is restarted, if it failed and spec.restarts is raised.
"""

from graft.api import Adapter, FineTuneJob
from graft.api.finetunejob import Sizing
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.contracts.job import CurrentVersion, JobFile
from graft.kube import KubeError, Manifest
from graft.manifests import adapter as adapter_manifests
from graft.manifests.metadata import FINALIZER, OWNER_UID
from graft.manifests.network import training_policy
from graft.manifests.training import (
    METHOD_LABEL,
    Shape,
    config_map,
    data_uris,
    is_edited,
    is_preflight,
    job_file,
    job_file_name,
    peers_service,
    preflight_job,
    training_job,
)
from graft.reconcile.adapter import versions
from graft.reconcile.finetunejob import quota, reports
from graft.reconcile.finetunejob.facts import QUOTA_EXCEEDED
from graft.reconcile.finetunejob.jobstatus import (
    KIND,
    World,
    checked,
    job_condition,
    memory_failures,
    observe,
    polled,
    suspended,
    unbound,
    waiting,
)
from graft.reconcile.finetunejob.placing import place
from graft.reconcile.finetunejob.published import read_published, register
from graft.reconcile.finetunejob.reservation import Needed, Write, claim_version, reserve_version
from graft.reconcile.finetunejob.restart import restart, to_restart
from graft.reconcile.shared import ending, pods, scheduling
from graft.reconcile.shared.access import (
    Base,
    Trouble,
    ensure_credentials,
    gather_base_model,
    refusal_of,
)
from graft.reconcile.shared.context import SOON, WAITING, Context
from graft.reconcile.shared.jobs import job_file_of, keep, not_started, pods_of, refusal, steer
from graft.reconcile.shared.stored import valid
from graft.status import find, seconds_left
from graft.work.together import together

# The annotation and labels by which Argo CD and Flux find what they applied.
GITOPS = frozenset(
    {
        "argocd.argoproj.io/tracking-id",
        "argocd.argoproj.io/instance",
        "kustomize.toolkit.fluxcd.io/name",
        "helm.toolkit.fluxcd.io/name",
    }
)


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one FineTuneJob. Return the seconds until the next reconcile, or None to wait for an event."""
    raw = await ctx.cache.get(KIND, namespace, name)
    if raw is None:
        return None
    job = FineTuneJob.model_validate(raw)
    if job.metadata.deletion_timestamp:
        return await _clean_up(ctx, raw, job)
    ended = find(job.status.conditions, "Succeeded")
    over = ended is not None and ended.status != "Unknown"
    new = FINALIZER not in job.metadata.finalizers
    starts = new and not over and not job.spec.suspend  # the start claims it, together with its version
    if not starts:
        claimed = await ctx.claim(raw, {} if over else _labels(job))
        if claimed is None:
            return None
        if claimed is not raw:
            raw, job = claimed, FineTuneJob.model_validate(claimed)
    if ended is not None and over:
        return await restart(ctx, raw, job) if to_restart(job, ended) else await _expire(ctx, job, ended)

    # No Job is created before the finalizer is set, so a FineTuneJob without it has none.
    world = World(job) if new else await _gather(ctx, job)
    if world.passed and not job.status.checked:
        await ctx.write_status(raw, checked(world), job.status.conditions)
        return 0
    unrecorded = bool(world.children) and not raw.get("status")  # the operator was stopped after it had created the Job
    if world.published is None and (not world.children or world.passed or unrecorded):
        if job.spec.suspend and not unrecorded:
            status, observed = suspended(job, await _sizing(ctx, job))
            await ctx.write_status(raw, status, observed)
            return None
        trouble = await _start(ctx, raw, world, starts)
        if trouble is not None:
            # It may have reserved its version before the trouble.
            present = await ctx.claim(await ctx.cache.get(KIND, namespace, name) or raw, _labels(job))
            if present is not None:
                status, observed = waiting(FineTuneJob.model_validate(present), trouble)
                await ctx.write_status(present, status, observed)
            return quota.IN_LINE if trouble.reason == QUOTA_EXCEEDED else WAITING
        return SOON
    repaired = not world.children or world.over or await _steer(ctx, world)
    if world.published is not None and world.adapter is None:
        await register(ctx, world)
    status, observed = observe(world)
    pause = await ctx.write_status(raw, status, observed, hurry=world.delayed is not None)
    succeeded = find(observed, "Succeeded")
    if succeeded is not None and succeeded.status != "Unknown":
        reports.forget(ctx, job)
        return 0  # it may have a TTL, or a restart that was asked for meanwhile; else the queue forgets it
    later = ctx.backoff.left(job.metadata.uid, job.metadata.generation) if world.delayed is not None else None
    coming = any(pods.creating(pod) for pod in world.pods)  # only an Event would say what is wrong
    polls = [pause, later, SOON if polled(world) else None, WAITING if coming or not repaired else None]
    return min((item for item in polls if item is not None), default=None)


async def _gather(ctx: Context, job: FineTuneJob) -> World:
    namespace, labels = job.metadata.namespace, {OWNER_UID: job.metadata.uid}
    world = World(job)
    jobs = await ctx.cache.list("Job", namespace, labels, owner=job.metadata.uid)
    world.children = [child for child in jobs if not is_preflight(child)] or jobs
    if not world.children:
        return world
    world.pods = await pods_of(ctx, namespace, job.metadata.uid, world.children)
    if not world.pods:
        if not world.children[0]["spec"].get("suspend"):
            world.refusal = await refusal(ctx, namespace, world.children[0]["metadata"]["uid"])
    else:
        world.refusal = await not_started(ctx, world.pods)
        world.progress = await reports.read(ctx, job, world.main_pods[-1], must=world.passed)
    resolved = job.status.resolved
    trained = not world.preflight and job_condition(world, "Complete") is not None
    if trained and resolved is not None and resolved.version is not None:
        name = adapter_manifests.adapter_name(job.spec.output.adapter, resolved.version)
        raw = await ctx.cache.get("Adapter", namespace, name)
        world.adapter = Adapter.model_validate(raw) if raw else None
        await read_published(ctx, world, resolved.version)
    return world


async def _steer(ctx: Context, world: World) -> bool:
    """Apply spec.suspend to the running Job, repair what its pods need, and halve the micro-batch after attempts that
    did not fit in memory. Return whether the pods have what they need."""
    job, child = world.job, world.children[0]
    namespace = job.metadata.namespace
    nodes = int(child["spec"].get("completions") or 1)
    if job.spec.queue is None:  # else Kueue alone suspends and resumes the Job
        await steer(ctx, child, suspend=job.spec.suspend, parallelism=nodes)
    live = await ctx.cache.get("ConfigMap", namespace, job_file_name(job))
    if live is not None and is_edited(live):
        live = None
    restored = await _restore_file(ctx, job, nodes) if live is None else None
    kept = await keep(ctx, namespace, *([restored] if restored is not None else []), *_network(ctx, job, nodes))
    if world.refusal is not None:  # the pod may wait for the Secret, of which the operator sees no deletion
        kept &= await ensure_credentials(ctx, namespace) is None
    halvings = memory_failures(world)
    file = job_file_of(live or restored) if halvings else None
    if file is not None and file.halvings < halvings:
        kept &= await keep(ctx, namespace, config_map(job, file.model_copy(update={"halvings": halvings})))
    return kept


def of_gitops(job: FineTuneJob) -> bool:
    """Return whether a tool applies the job from Git (PURE). The tool would create a deleted job again, which would train
    again."""
    return bool(GITOPS & {*job.metadata.annotations, *job.metadata.labels})


async def _expire(ctx: Context, job: FineTuneJob, ended: Condition) -> float | None:
    """Delete a job that ended ttlSecondsAfterFinished ago. Return the seconds until then, or None."""
    ttl = job.spec.ttl_seconds_after_finished
    if ttl is None or of_gitops(job):
        return None
    left = seconds_left(ended.last_transition_time, ttl)
    if left > 0:
        return left
    await ctx.kube.delete(KIND, job.metadata.namespace, job.metadata.name, job.metadata.uid)
    return None


async def _start(ctx: Context, raw: Manifest, world: World, new: bool) -> Trouble | None:
    """Resolve what the spec leaves open and create the next Job. Return what the job waits for, or None.

    `new`: the job has no finalizer yet.
    """
    job, namespace = world.job, world.job.metadata.namespace
    base = await gather_base_model(ctx, job.spec.base_model, namespace)
    if isinstance(base, Trouble):
        return base
    if (outside := outside_namespace(job, ctx.store.config.bucket)) is not None:
        return outside
    if (refused := scheduling.forbidden(job.spec, ctx.settings.allowed, template=job.spec.pod_template)) is not None:
        return refused
    if not new and (trouble := await ensure_credentials(ctx, namespace)) is not None:
        return trouble
    placed = await place(ctx, job, base)
    if isinstance(placed, Trouble):
        return placed
    preflight = bool(placed[0].gpus and not job.status.checked)
    if world.children and not world.passed:  # it has begun: the operator was stopped after it had created the Job
        return await _create(ctx, raw, world, base, placed, new, preflight)
    async with quota.kept(ctx, job, placed[0].gpus * placed[0].nodes, preflight=preflight) as exceeded:
        return exceeded or await _create(ctx, raw, world, base, placed, new, preflight)


async def _create(
    ctx: Context, raw: Manifest, world: World, base: Base, placed: tuple[Shape, Sizing], new: bool, preflight: bool
) -> Trouble | None:
    """Reserve the version and create the next Job, with what its pods need. Return what the job waits for, or None."""
    job, namespace = world.job, world.job.metadata.namespace
    shape, sizing = placed
    needed = Needed(lambda version: _put(ctx, job, base, version, shape))
    try:
        async with ctx.locks.hold("version", namespace, job.spec.output.adapter), needed.or_stopped():
            reserved: Write | str | Trouble
            if new:  # a user waits for its start
                reserved = await claim_version(ctx, raw, job, base.ref, sizing, _labels(job), needed.begin)
            else:
                reserved = await reserve_version(ctx, raw, job, base.ref, sizing, needed.begin)
    except StoreError as error:
        return Trouble(
            "StorageUnavailable",
            f"cannot list the versions of {job.spec.output.adapter} in storage, the operator retries: {error}",
        )
    if isinstance(reserved, Trouble):
        return reserved
    child = (
        preflight_job(job, base.ref, ctx.settings) if preflight else training_job(job, base.ref, ctx.settings, shape)
    )
    try:
        # Before the Job: no pod runs without its NetworkPolicy.
        if (trouble := await needed.written()) is not None:
            return trouble
        await together(ctx.kube.create(child), *([reserved()] if callable(reserved) else []))
    except KubeError as error:
        if (refused := refusal_of(ctx, namespace, "the children of the job", error)) is None:
            raise
        for child in world.children if error.status == 403 and "quota" in str(error) else []:
            # A quota may allow only one Job. If the preflight Job is deleted, only the log of its pod is lost.
            uid = child["metadata"]["uid"]
            await ctx.kube.delete("Job", namespace, child["metadata"]["name"], uid, "Background")
        return refused
    return None


def _labels(job: FineTuneJob) -> dict[str, str]:
    """Return the labels of a job: the method, which no path of the spec has as a value, for the column METHOD, and the
    adapter, by which jobs that publish versions of it are found (PURE)."""
    return {METHOD_LABEL: job.spec.method.name, adapter_manifests.ADAPTER_LABEL: job.spec.output.adapter}


async def _sizing(ctx: Context, job: FineTuneJob) -> Sizing | None:
    """Return what a suspended job would need. The present sizing if it cannot be decided now."""
    base = await gather_base_model(ctx, job.spec.base_model, job.metadata.namespace)
    placed = base if isinstance(base, Trouble) else await place(ctx, job, base)
    return job.status.sizing if isinstance(placed, Trouble) else placed[1]


def _network(ctx: Context, job: FineTuneJob, nodes: int) -> list[Manifest]:
    """Return the manifests of what the pods of a run need in the network (PURE)."""
    return [training_policy(job, ctx.settings), *([peers_service(job)] if nodes > 1 else [])]


async def _put(ctx: Context, job: FineTuneJob, base: Base, version: str, shape: Shape) -> Trouble | None:
    """Write what the pods of a job need. Return what is missing in the namespace, or None."""
    file = await _job_file(ctx, job, base, version, shape)
    put = ctx.kube.put(config_map(job, file), *_network(ctx, job, shape.nodes))
    trouble, _ = await together(ensure_credentials(ctx, job.metadata.namespace), put)
    return trouble


async def _job_file(ctx: Context, job: FineTuneJob, base: Base, version: str, shape: Shape) -> JobFile:
    return job_file(
        job,
        base.ref,
        version,
        versions.recipe(job.spec),
        ctx.settings,
        shape=shape,
        task=base.model.spec.task,
        current=await _current_version(ctx, job),
    )


async def _restore_file(ctx: Context, job: FineTuneJob, nodes: int) -> Manifest | None:
    """Return the ConfigMap with job.json, made again for the next attempt. None if the pods would be others now."""
    base, resolved = await gather_base_model(ctx, job.spec.base_model, job.metadata.namespace), job.status.resolved
    if isinstance(base, Trouble) or resolved is None or resolved.version is None:
        return None
    placed = await place(ctx, job, base)
    if isinstance(placed, Trouble) or placed[0].nodes != nodes or base.ref.uri != resolved.base_model_uri:
        return None
    return config_map(job, await _job_file(ctx, job, base, resolved.version, placed[0]))


async def _current_version(ctx: Context, job: FineTuneJob) -> CurrentVersion | None:
    """Return the adapter's newest Ready version if a gate compares with it, else None."""
    if not any(gate.over == "current" for gate in job.spec.evaluation.gates or []):
        return None
    labelled = {adapter_manifests.ADAPTER_LABEL: job.spec.output.adapter}
    found = valid(Adapter, await ctx.cache.list("Adapter", job.metadata.namespace, labelled))
    ready = [item for item in found if (ready := find(item.status.conditions, "Ready")) and ready.status == "True"]
    if not ready:
        return None
    newest = max(ready, key=lambda item: versions.parse(item.spec.version) or (0, 0, 0))
    artifact = newest.published
    return CurrentVersion(version=newest.spec.version, uri=artifact.uri, digest=artifact.digest)


def outside_namespace(job: FineTuneJob, bucket: str) -> Trouble | None:
    """Return why data in another tenant's part of the bucket is refused, or None (PURE).

    The namespace's key could not read it anyway.
    """
    tenant = layout.tenant_of(job.metadata.namespace)
    own = layout.s3_uri(bucket, layout.tenant_prefix(tenant))
    for where, uri in data_uris(job):
        if layout.outside_tenants_part(uri, bucket, tenant):
            return Trouble(
                "DatasetOutsideNamespace",
                f"spec.{where}: {uri} is outside this namespace's part of the bucket. Put the data below {own}",
            )
    return None


async def _clean_up(ctx: Context, raw: Manifest, job: FineTuneJob) -> float | None:
    """Delete the Jobs and the run's files of a deleted job. Its Adapter and the published files stay."""
    left = await ending.stop(ctx, job)
    if isinstance(left, Trouble):
        await ctx.write_status(raw, job.status, unbound(job, left))
        return WAITING
    if left is not None:
        return left
    await ctx.remove_finalizer(job, KIND)
    return None
