"""The life of a FineTuneJob.

    wait for the base model and the key -> reserve a version (status.resolved) -> ConfigMap, NetworkPolicy, Job
    -> follow pods and progress.json -> manifest.json in storage -> Adapter -> its verification -> Succeeded

Every step is found again from what exists: the version in status, the Job by the label of our UID, the manifest by its path and job
UID. A job that ended (Succeeded is True or False) is never touched again.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from graft.api import Adapter, FineTuneJob
from graft.api.finetunejob import AdapterReference, Attempt, FineTuneJobStatus, Resolved
from graft.api.finetunejob import Progress as ProgressStatus
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.store import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts import BaseModelRef, Progress, Reason
from graft.kube import KubeError, Manifest
from graft.manifests import adapter as adapter_manifests
from graft.manifests.common import OWNER_UID
from graft.manifests.network import training_policy
from graft.manifests.training import METHOD_LABEL, config_map, job_file, training_job
from graft.reconcile import pods, versions
from graft.reconcile.access import Trouble, ensure_credentials, gather_base_model, not_bound
from graft.reconcile.context import SOON, WAITING, Context
from graft.status import condition, duration, find

KIND = "FineTuneJob"
STAGES = ("Preparing", "Training", "Evaluating", "Publishing")


@dataclass
class World:
    """What exists for a job now."""

    job: FineTuneJob
    children: list[Manifest] = field(default_factory=list)  # the Job, by our UID
    pods: list[Manifest] = field(default_factory=list)  # oldest first
    progress: Progress | None = None  # of the newest attempt
    published: tuple[AdapterManifest, str] | None = None  # the manifest that this job wrote, and its digest
    publish_trouble: str | None = None  # why there is none
    adapter: Adapter | None = None


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """One look at one job; the seconds until the next look, or None."""
    raw = await ctx.kube.get(KIND, namespace, name)
    if raw is None:
        return None
    job = FineTuneJob.model_validate(raw)
    if job.metadata.deletion_timestamp:
        return await _clean_up(ctx, job)
    if await ctx.add_finalizer(job, KIND):
        return 0
    ended = find(job.status.conditions, "Succeeded")
    if ended is not None and ended.status != "Unknown":
        return None

    world = await _gather(ctx, job)
    if not world.children and world.published is None:
        trouble = await _start(ctx, raw, job)
        if trouble is not None:
            status, observed = waiting(job, trouble)
            await ctx.write_status(raw, status, observed)
            return WAITING
        return 0
    if world.published is not None and world.adapter is None:
        manifest, digest = world.published
        await ctx.kube.apply(adapter_manifests.adapter(job, manifest, digest, ctx.store.config.bucket))
    status, observed = observe(world)
    await ctx.write_status(raw, status, observed)
    succeeded = find(observed, "Succeeded")
    return None if succeeded is not None and succeeded.status != "Unknown" else SOON


async def _gather(ctx: Context, job: FineTuneJob) -> World:
    namespace, labels = job.metadata.namespace, {OWNER_UID: job.metadata.uid}
    world = World(job)
    world.children = await ctx.kube.list("Job", namespace, labels)
    if not world.children:
        return world
    found = await ctx.kube.list("Pod", namespace, labels)
    world.pods = sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])
    if world.pods:
        world.progress = await _read_progress(ctx, job, pods.name(world.pods[-1]))
    resolved = job.status.resolved
    if _job_condition(world, "Complete") and resolved is not None and resolved.version is not None:
        name = adapter_manifests.adapter_name(job.spec.output.adapter, resolved.version)
        raw = await ctx.kube.get("Adapter", namespace, name)
        world.adapter = Adapter.model_validate(raw) if raw else None
        await _read_published(ctx, world, resolved.version)
    return world


async def _read_progress(ctx: Context, job: FineTuneJob, attempt: str) -> Progress | None:
    prefix = layout.attempt_prefix(layout.tenant_of(job.metadata.namespace), job.metadata.uid, attempt)
    try:
        return Progress.model_validate_json(await ctx.blocking(ctx.store.get, prefix + layout.PROGRESS))
    except (StoreError, ValidationError):
        return None  # not written yet, or not readable just now: the pod's own status says enough


async def _read_published(ctx: Context, world: World, version: str) -> None:
    job = world.job
    prefix = layout.adapter_prefix(layout.tenant_of(job.metadata.namespace), job.spec.output.adapter, version)
    try:
        manifest, digest = await ctx.blocking(read_manifest, ctx.store, prefix, None)
    except InvalidArtifact as error:
        world.publish_trouble = str(error)
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        world.publish_trouble = f"no manifest.json below {prefix}: {error}"
    else:
        if manifest.job.uid == job.metadata.uid:
            world.published = (manifest, digest)
        else:
            world.publish_trouble = f"{prefix}manifest.json was written by another job, {manifest.job.name}"


async def _start(ctx: Context, raw: Manifest, job: FineTuneJob) -> Trouble | None:
    """Resolve what the spec leaves open and make the children; Trouble says what is waited for."""
    namespace = job.metadata.namespace
    base_model = await gather_base_model(ctx, job.spec.base_model, namespace)
    if isinstance(base_model, Trouble):
        return base_model
    if (outside := outside_namespace(job, ctx.store.config.bucket)) is not None:
        return outside
    trouble = await ensure_credentials(ctx, namespace)
    if trouble is not None:
        return trouble
    try:
        async with ctx.locks["version", namespace, job.spec.output.adapter]:
            version = await _reserve_version(ctx, raw, job, base_model)
    except StoreError as error:
        return Trouble("StorageUnavailable", f"the versions in storage cannot be listed: {error}")
    if isinstance(version, Trouble):
        return version
    file = job_file(job, base_model, version, versions.recipe(job.spec), ctx.settings)
    try:
        await ctx.kube.apply(config_map(job, file))
        await ctx.kube.apply(training_policy(job))
        await ctx.kube.create(training_job(job, base_model, ctx.settings))
        if job.metadata.labels.get(METHOD_LABEL) != job.spec.method.name:
            await ctx.kube.merge_patch(
                KIND, namespace, job.metadata.name, {"metadata": {"labels": {METHOD_LABEL: job.spec.method.name}}}
            )
    except KubeError as error:
        if error.status == 403 and "quota" not in str(error):
            return Trouble("NamespaceNotBound", f"{not_bound(ctx, namespace)} ({error})")
        if error.status in {403, 409, 422}:
            return Trouble("CreationFailed", str(error))
        raise
    return None


async def _reserve_version(ctx: Context, raw: Manifest, job: FineTuneJob, base_model: BaseModelRef) -> str | Trouble:
    """The version this job publishes, written to its status before anything else sees it."""
    resolved = job.status.resolved
    if resolved is not None and resolved.version is not None:
        return resolved.version
    known = await _known_versions(ctx, job)
    recipe = versions.recipe(job.spec)
    version = job.spec.output.version
    if version == "auto":
        version = versions.next_version(known, recipe, job.spec.base_model)
    elif any(item.version == version for item in known):
        adapter = job.spec.output.adapter
        return Trouble(
            "VersionExists", f"{adapter} {version} is published or on its way; use output.version: auto or another one"
        )
    reserved = Resolved(
        version=version,
        recipe=recipe,
        base_model_uri=base_model.uri,
        base_model_digest=base_model.digest or base_model.uri,
    )
    status = job.status.model_copy(update={"resolved": reserved, "stage": "Pending"})
    message = f"publishes {job.spec.output.adapter} {version}, tuned on {base_model.uri}"
    observed = [
        condition(KIND, "Accepted", "True", "Resolved", message),
        condition(KIND, "Succeeded", "Unknown", "Pending", "the training pod is being made"),
    ]
    await ctx.write_status(raw, status, observed)
    return version


async def _known_versions(ctx: Context, job: FineTuneJob) -> list[versions.Known]:
    namespace, adapter = job.metadata.namespace, job.spec.output.adapter
    known = []
    for raw in await ctx.kube.list("Adapter", namespace, {adapter_manifests.ADAPTER_LABEL: adapter}):
        recipe = raw["metadata"].get("annotations", {}).get(adapter_manifests.RECIPE)
        known.append(versions.Known(raw["spec"]["version"], recipe, raw["spec"]["baseModel"]))
    for raw in await ctx.kube.list(KIND, namespace):
        resolved = raw.get("status", {}).get("resolved", {})
        if (
            raw["metadata"]["uid"] != job.metadata.uid
            and raw["spec"]["output"]["adapter"] == adapter
            and resolved.get("version")
        ):
            known.append(versions.Known(resolved["version"], resolved.get("recipe"), raw["spec"]["baseModel"]))
    prefix = layout.adapter_versions_prefix(layout.tenant_of(namespace), adapter)
    stored = await ctx.blocking(ctx.store.folders, prefix)
    return known + [versions.Known(version, None, None) for version in stored if versions.parse(version)]


def outside_namespace(job: FineTuneJob, bucket: str) -> Trouble | None:
    """A dataset in another tenant's part of our bucket is refused at once; its key could not read it anyway (PURE)."""
    prefix = layout.tenant_prefix(layout.tenant_of(job.metadata.namespace))
    for role, source in (("train", job.spec.dataset.train), ("eval", job.spec.dataset.eval)):
        if source is None or not source.uri.startswith(f"s3://{bucket}/"):
            continue
        _, key = layout.split_s3_uri(source.uri)
        if not key.startswith(prefix):
            return Trouble(
                "DatasetOutsideNamespace",
                f"dataset.{role}: {source.uri} is outside of this namespace's part of the bucket; put it below s3://{bucket}/{prefix}",
            )
    return None


def waiting(job: FineTuneJob, trouble: Trouble) -> tuple[FineTuneJobStatus, list[Condition]]:
    """The status of a job that cannot start yet (PURE)."""
    status = job.status.model_copy(update={"stage": "Waiting"})
    return status, [
        condition(KIND, "Accepted", "False", trouble.reason, trouble.message),
        condition(KIND, "Succeeded", "Unknown", "Waiting", trouble.message),
    ]


def observe(world: World) -> tuple[FineTuneJobStatus, list[Condition]]:
    """The status of a job that has started (PURE)."""
    job = world.job
    accepted = find(job.status.conditions, "Accepted")
    message = accepted.message if accepted and accepted.status == "True" else "the job has started"
    observed = [condition(KIND, "Accepted", "True", "Resolved", message), _succeeded(world)]
    reason = observed[1].reason
    ended = observed[1].status != "Unknown"
    stage = {"True": "Succeeded", "False": "Failed"}.get(
        observed[1].status, "Pending" if reason == "Retrying" else reason
    )
    changes: dict[str, Any] = {"stage": stage, "attempts": _attempts(world)}
    if world.pods:
        changes["start_time"] = job.status.start_time or world.pods[0].get("status", {}).get("startTime")
    if ended and world.children:
        child_status = world.children[0].get("status", {})
        times = [item.get("lastTransitionTime") for item in child_status.get("conditions", [])]
        changes["completion_time"] = child_status.get("completionTime") or (
            max(filter(None, times)) if any(times) else None
        )
    if world.progress is not None:
        changes |= _progress_fields(world.progress, job.status.resolved or Resolved(), ended)
    if ended:
        changes["eta_text"] = None
    if world.published is not None:
        manifest, _ = world.published
        changes["metrics"] = manifest.metrics
        changes["adapter_ref"] = AdapterReference(
            name=adapter_manifests.adapter_name(manifest.adapter, manifest.version),
            adapter=manifest.adapter,
            version=manifest.version,
        )
        if observed[1].status != "True":
            changes["adapter_ref"] = None
    return job.status.model_copy(update=changes), observed


def _progress_fields(progress: Progress, resolved: Resolved, ended: bool) -> dict[str, Any]:
    shown = ProgressStatus.model_validate(progress.model_dump())
    loss = progress.loss
    fields: dict[str, Any] = {
        "progress": shown,
        "progress_text": f"{progress.percent}%",
        "loss_text": None if loss is None else f"{loss:.4f}",
        "eta_text": None if ended or progress.eta_seconds is None else duration(progress.eta_seconds),
        "resolved": resolved.model_copy(
            update={
                "training": progress.training or resolved.training,
                "target_modules": progress.target_modules or resolved.target_modules,
                "trainable_parameters": progress.trainable_parameters or resolved.trainable_parameters,
                "total_parameters": progress.total_parameters or resolved.total_parameters,
            }
        ),
    }
    if progress.metrics:
        fields["metrics"] = progress.metrics
    return fields


def _job_condition(world: World, type_: str) -> dict[str, Any] | None:
    for child in world.children:
        for item in child.get("status", {}).get("conditions", []):
            if item["type"] == type_ and item["status"] == "True":
                return dict(item)
    return None


def _succeeded(world: World) -> Condition:
    failed = _job_condition(world, "Failed") or _job_condition(world, "FailureTarget")
    if failed is not None:
        return _failure(world, failed)
    if _job_condition(world, "Complete") is not None:
        return _completion(world)
    if not world.pods:
        return condition(KIND, "Succeeded", "Unknown", "Pending", "the Job has no pod yet")
    newest = world.pods[-1]
    if pods.phase(newest) == "Failed":
        end = pods.ending(newest)
        text = end.text if end is not None else "no reason given"
        return condition(KIND, "Succeeded", "Unknown", "Retrying", f"pod {pods.name(newest)} failed: {text}")
    stuck = pods.waiting_message(newest)
    if stuck is not None:
        return condition(KIND, "Succeeded", "Unknown", "Pending", stuck)
    if pods.running(newest, "prepare"):
        return condition(KIND, "Succeeded", "Unknown", "Preparing", "dataset, access and base model are checked")
    if pods.running(newest, "train") or pods.phase(newest) == "Succeeded":
        stage = world.progress.stage if world.progress is not None and world.progress.stage in STAGES else "Training"
        if stage == "Preparing":  # the file is of the init container still
            stage = "Training"
        if pods.phase(newest) == "Succeeded":
            stage = "Publishing"
        return condition(KIND, "Succeeded", "Unknown", stage, f"pod {pods.name(newest)}")
    return condition(KIND, "Succeeded", "Unknown", "Pending", f"pod {pods.name(newest)} is on its way")


def _failure(world: World, failed: dict[str, Any]) -> Condition:
    if failed.get("reason") == "DeadlineExceeded":
        deadline = world.job.spec.active_deadline_seconds
        text = f"the job ran for longer than activeDeadlineSeconds ({deadline}); raise it, or make the run shorter"
        return condition(KIND, "Succeeded", "False", "DeadlineExceeded", text)
    endings = [end for pod in reversed(world.pods) if (end := pods.ending(pod)) is not None]
    if endings:
        return condition(KIND, "Succeeded", "False", endings[0].reason, endings[0].text)
    if world.progress is not None and world.progress.failure is not None:
        failure = world.progress.failure
        return condition(KIND, "Succeeded", "False", failure.reason, f"{failure.message} {failure.remedy}")
    return condition(KIND, "Succeeded", "False", Reason.INTERNAL_ERROR, failed.get("message") or "the Job failed")


def _completion(world: World) -> Condition:
    if world.published is None:
        text = world.publish_trouble or "the pod succeeded, but left no manifest.json"
        return condition(KIND, "Succeeded", "False", "ResultMissing", text)
    manifest, digest = world.published
    ready = find(world.adapter.status.conditions, "Ready") if world.adapter is not None else None
    if world.adapter is not None and world.adapter.spec.artifact.digest != digest:
        text = f"Adapter {world.adapter.metadata.name} is of another artifact, {world.adapter.spec.artifact.digest}"
        return condition(KIND, "Succeeded", "False", "ArtifactInvalid", text)
    if ready is None or ready.reason in {"Verifying", "StorageUnavailable"}:
        return condition(KIND, "Succeeded", "Unknown", "Publishing", "the published files are verified")
    if ready.status != "True":
        return condition(KIND, "Succeeded", "False", "ArtifactInvalid", ready.message)
    scores = ", ".join(f"{key} {value:.4g}" for key, value in sorted(manifest.metrics.items()))
    return condition(
        KIND,
        "Succeeded",
        "True",
        "Published",
        f"Adapter {manifest.adapter}-{manifest.version}: {scores or 'not measured'}",
    )


def _attempts(world: World) -> list[Attempt]:
    attempts = {item.pod: item for item in world.job.status.attempts or []}
    for pod in world.pods:
        end = pods.ending(pod)
        done = pods.phase(pod) == "Succeeded"
        finished = [
            state["finishedAt"]
            for item in pods.statuses(pod)
            if (state := item.get("state", {}).get("terminated")) and state.get("finishedAt")
        ]
        over = done or pods.phase(pod) == "Failed"
        attempts[pods.name(pod)] = Attempt(
            pod=pods.name(pod),
            started_at=pod.get("status", {}).get("startTime"),
            ended_at=max(finished) if over and finished else None,
            reason="Completed" if done else end.reason if over and end is not None else None,
            message=end.message[:500] if over and end is not None else None,
        )
    return sorted(attempts.values(), key=lambda item: item.started_at or "~")


async def _clean_up(ctx: Context, job: FineTuneJob) -> float | None:
    """A deleted job leaves its Adapter and nothing else: pods first, so that nobody writes any more, then its runs/ prefix."""
    namespace, labels = job.metadata.namespace, {OWNER_UID: job.metadata.uid}
    for child in await ctx.kube.list("Job", namespace, labels):
        if not child["metadata"].get("deletionTimestamp"):
            await ctx.kube.delete("Job", namespace, child["metadata"]["name"], child["metadata"]["uid"], "Foreground")
    if await ctx.kube.list("Pod", namespace, labels) or await ctx.kube.list("Job", namespace, labels):
        return SOON
    await ctx.blocking(ctx.store.delete_prefix, layout.run_prefix(layout.tenant_of(namespace), job.metadata.uid))
    await ctx.remove_finalizer(job, KIND)
    return None
