"""Compute a FineTuneJob's status from the objects that exist (PURE)."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from graft.api import Adapter, FineTuneJob
from graft.api.finetunejob import (
    AdapterReference,
    Attempt,
    Checkpoint,
    DatasetFacts,
    FineTuneJobStatus,
    Resolved,
    Sizing,
)
from graft.api.finetunejob import Progress as ProgressStatus
from graft.api.meta import Condition
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.contracts.progress import Progress, Reason
from graft.kube import Manifest
from graft.manifests import adapter as adapter_manifests
from graft.manifests.training import is_preflight, preflight_name
from graft.reconcile.shared import pods
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.jobs import condition_of
from graft.reconcile.shared.pods import sentences
from graft.reconcile.shared.publishing import COPYING
from graft.status import REASONS, condition, duration, find

KIND = "FineTuneJob"
MUCH_TRUNCATED = 0.1  # share of the examples
NO_POD = "the Job has no pod yet"
STAGES = ("Preparing", "Training", "Evaluating", "Publishing")


@dataclass
class World:
    """The objects that exist for a job at the time of a reconcile."""

    job: FineTuneJob
    children: list[Manifest] = field(default_factory=list)  # the training Job, or the preflight Job before it exists
    pods: list[Manifest] = field(default_factory=list)  # of that Job, oldest first
    progress: Progress | None = None  # of the newest attempt
    published: tuple[AdapterManifest, str] | None = None  # the manifest that this job wrote, and its digest
    publish_trouble: str | None = None  # why `published` is None
    copying: bool = False  # the operator copies the staged files to the version's folder
    delayed: str | None = None  # why the operator will read or publish the staged files later
    refusal: str | None = None  # why the Job could not create its pod, or the node does not start its containers
    adapter: Adapter | None = None

    @property
    def main_pods(self) -> list[Manifest]:
        """Return the pods that report progress: those with index 0 if several pods train together."""
        return [pod for pod in self.pods if pods.index(pod) == 0] or self.pods

    @property
    def preflight(self) -> bool:
        """Return whether the Job is the preflight Job, which runs before GPUs are requested."""
        return any(is_preflight(child) for child in self.children)

    @property
    def passed(self) -> bool:
        """Return whether the preflight Job has succeeded."""
        return self.preflight and job_condition(self, "Complete") is not None

    @property
    def over(self) -> bool:
        """Return whether the Job has ended."""
        return any(
            job_condition(self, type_) for type_ in ("Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")
        )


def memory_failures(world: World) -> int:
    """Return how often the run did not fit in memory. The pod index with the most such attempts counts (PURE)."""
    counts = Counter(attempt.index or 0 for attempt in _attempts(world) if attempt.reason == Reason.MEMORY_EXCEEDED)
    return max(counts.values(), default=0)


def checked(world: World) -> FineTuneJobStatus:
    """Return the status of a job whose preflight checks passed (PURE).

    It keeps the facts about the dataset after the pod is deleted.
    """
    job, data = world.job, world.progress.dataset if world.progress is not None else None
    facts = DatasetFacts.model_validate(data.model_dump()) if data is not None else job.status.dataset
    return job.status.model_copy(update={"checked": True, "dataset": facts})


def suspended(job: FineTuneJob, sizing: Sizing | None) -> tuple[FineTuneJobStatus, list[Condition]]:
    """Return the status of a job that is suspended before it started (PURE)."""
    status = job.status.model_copy(update={"stage": "Suspended", "sizing": sizing})
    text = "spec.suspend is true. Set it to false to start the job"
    accepted = find(job.status.conditions, "Accepted")
    return status, ([accepted] if accepted else []) + [condition(KIND, "Succeeded", "Unknown", "Suspended", text)]


def waiting(job: FineTuneJob, trouble: Trouble) -> tuple[FineTuneJobStatus, list[Condition]]:
    """Return the status of a job that cannot start yet (PURE)."""
    status = job.status.model_copy(update={"stage": "Waiting"})
    return status, [
        condition(KIND, "Accepted", "False", trouble.reason, trouble.message),
        condition(KIND, "Succeeded", "Unknown", "Waiting", trouble.message),
    ]


def unbound(job: FineTuneJob, trouble: Trouble) -> list[Condition]:
    """Return the conditions of a job whose children the operator may not delete (PURE)."""
    kept = [item for item in job.status.conditions if item.type != "Accepted"]
    return [condition(KIND, "Accepted", "False", trouble.reason, trouble.message), *kept]


def plan_of(job: FineTuneJob, found: Resolved | None) -> str:
    """Return what a job that is accepted will do (PURE)."""
    if found is None:
        return "the job has started"
    return f"the job will publish {job.spec.output.adapter} {found.version}, tuned on {found.base_model_uri}"


def observe(world: World) -> tuple[FineTuneJobStatus, list[Condition]]:
    """Return the status of a job that has started (PURE)."""
    job = world.job
    observed = [condition(KIND, "Accepted", "True", "Resolved", plan_of(job, job.status.resolved)), _succeeded(world)]
    reason = observed[1].reason
    ended = observed[1].status != "Unknown"
    stage = {"True": "Succeeded", "False": "Rejected" if reason == "GateFailed" else "Failed"}.get(
        observed[1].status, "Pending" if reason in {"Retrying", "QuotaExceeded"} else reason
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
        if observed[1].status != "True" and reason != "GateFailed":
            changes["adapter_ref"] = None
    return job.status.model_copy(update=changes), observed


def polled(world: World) -> bool:
    """Return whether something may change without an event of the job's objects: progress.json while a pod works, and
    the Event with the reason why a Job has no pod (PURE)."""
    if world.over or not world.children:
        return False
    if not world.pods:
        return not world.children[0]["spec"].get("suspend")
    newest = world.main_pods[-1]
    return pods.running(newest, "train") or pods.running(newest, "prepare")


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
                "world_size": progress.world_size or resolved.world_size,
                "trainable_parameters": progress.trainable_parameters or resolved.trainable_parameters,
                "total_parameters": progress.total_parameters or resolved.total_parameters,
            }
        ),
    }
    if progress.metrics:
        fields["metrics"] = progress.metrics
    if progress.dataset is not None:
        fields["dataset"] = DatasetFacts.model_validate(progress.dataset.model_dump())
    if progress.checkpoints is not None:
        fields["checkpoints"] = [Checkpoint.model_validate(item.model_dump()) for item in progress.checkpoints]
    return fields


def job_condition(world: World, type_: str) -> dict[str, Any] | None:
    found = [condition_of(child, type_) for child in world.children]
    return next((item for item in found if item.get("status") == "True"), None)


def _succeeded(world: World) -> Condition:
    failed = job_condition(world, "Failed") or job_condition(world, "FailureTarget")
    if failed is not None:
        return _failure(world, failed)
    if job_condition(world, "Complete") is not None and not world.preflight:
        return _completion(world)
    held = _held(world)
    if held is not None:
        return held
    if not world.pods:
        refused = world.refusal
        text = f"Kubernetes refuses the pod of the Job and retries: {refused}" if refused else NO_POD
        return condition(KIND, "Succeeded", "Unknown", "QuotaExceeded" if "exceeded quota" in text else "Pending", text)
    newest = world.main_pods[-1]
    if pods.phase(newest) == "Failed":
        end = _cause(world.pods)
        text = end.text if end is not None else "no reason given"
        return condition(
            KIND,
            "Succeeded",
            "Unknown",
            "Retrying",
            f"pod {pods.name(newest)} failed, and another attempt follows: {text}",
        )
    stuck = pods.waiting_message(newest) or world.refusal
    if stuck is not None:
        return condition(KIND, "Succeeded", "Unknown", "Pending", stuck)
    if pods.completed(newest, "train") or (pods.phase(newest) == "Succeeded" and not world.preflight):
        return condition(KIND, "Succeeded", "Unknown", "Publishing", "the operator verifies the published files")
    if pods.running(newest, "train"):
        # Until training writes its first record, progress.json is the one of the init container.
        stage = world.progress.stage if world.progress is not None else _stage_before(world)
        if stage == "Succeeded":  # the pod has published the version, and deletes its checkpoints
            stage = "Publishing"
        stage = stage if stage in STAGES[1:] else "Training"
        return condition(KIND, "Succeeded", "Unknown", stage, f"{_warnings(world)}running in pod {pods.name(newest)}")
    if pods.running(newest, "prepare") or pods.completed(newest, "prepare"):
        text = "the pod checks the dataset, the access to storage and the base model"
        text += " before GPUs are requested" if world.preflight else ""
        return condition(KIND, "Succeeded", "Unknown", "Preparing", text)
    return condition(KIND, "Succeeded", "Unknown", "Pending", f"pod {pods.name(newest)} is starting")


def _held(world: World) -> Condition | None:
    """Return the condition of a suspended Job: the user suspended it, or Kueue has not admitted it yet.

    None if it may run.
    """
    job = world.job
    if not world.children or not world.children[0]["spec"].get("suspend"):
        return None
    if world.preflight and not job.spec.suspend:
        text = (
            f"Job {preflight_name(job)} is suspended, but Graft did not suspend it. Kueue suspends Jobs that name no queue if its "
            "manageJobsWithoutQueueName is set. Exclude this namespace with Kueue's managedJobsNamespaceSelector"
        )
        return condition(KIND, "Succeeded", "Unknown", "Pending", text)
    if job.spec.queue is not None:
        text = f"the job waits until Kueue admits it from the queue {job.spec.queue} (spec.queue). See kubectl get workloads -n {job.metadata.namespace}"
        return condition(KIND, "Succeeded", "Unknown", "Queued", text)
    kept = job.status.checkpoints or []
    how = (
        f"resumes from the checkpoint of step {kept[-1].step}"
        if kept
        else "starts from the beginning, because it has no checkpoint yet"
    )
    text = f"spec.suspend is true. If you set it to false, the job {how}"
    return condition(KIND, "Succeeded", "Unknown", "Suspended", text)


def _warnings(world: World) -> str:
    """Return warnings about the dataset and the modules, while the user can still stop the run."""
    found = world.progress.dataset if world.progress is not None else world.job.status.dataset
    told = (
        [f"{world.progress.unreached.rstrip('.')}; "] if world.progress is not None and world.progress.unreached else []
    )
    if found is None:
        return "".join(told)
    if found.truncated_share > MUCH_TRUNCATED:
        told.append(f"{found.truncated_share:.0%} of the examples are truncated to spec.training.maxLength; ")
    if found.repeated:
        told.append(f"{found.repeated} held-out examples are also in the training data; ")
    return "".join(told)


def _stage_before(world: World) -> str:
    """Return the stage that the status shows for this running pod. It is used if the store did not answer."""
    before = find(world.job.status.conditions, "Succeeded")
    return before.reason if before is not None and before.message.endswith(pods.name(world.main_pods[-1])) else ""


def _cause(found: list[Manifest]) -> pods.Ending | None:
    """Return the newest ending that shows the cause.

    A pod that ended because another pod ended (PeerLost) shows no cause.
    """
    endings = [end for pod in reversed(found) if (end := pods.ending(pod)) is not None]
    first = [end for end in endings if end.reason != Reason.PEER_LOST]
    return next(iter(first or endings), None)


def _failure(world: World, failed: dict[str, Any]) -> Condition:
    if failed.get("reason") == "DeadlineExceeded":
        deadline = world.job.spec.active_deadline_seconds
        text = f"the job ran for longer than spec.activeDeadlineSeconds ({deadline} s). Raise it and spec.restarts to resume"
        return condition(KIND, "Succeeded", "False", "DeadlineExceeded", text)
    end = _cause(world.pods)
    if end is not None:
        return condition(KIND, "Succeeded", "False", _final_reason(end.reason), end.text)
    if world.progress is not None and world.progress.failure is not None:
        failure = world.progress.failure
        text = sentences(failure.message, failure.remedy)
        return condition(KIND, "Succeeded", "False", _final_reason(failure.reason), text)
    return condition(KIND, "Succeeded", "False", Reason.INTERNAL_ERROR, failed.get("message") or "the Job failed")


def _final_reason(said: str) -> str:
    """Return the reason of the condition for the reason that a pod reports. A pod may report any reason."""
    if said == Reason.MEMORY_EXCEEDED:  # it announces an attempt with half the micro-batch, but no attempt follows
        return Reason.OUT_OF_MEMORY
    return said if said in REASONS[KIND]["Succeeded"] else Reason.INTERNAL_ERROR


def _completion(world: World) -> Condition:
    if world.copying:
        return condition(KIND, "Succeeded", "Unknown", "Publishing", COPYING)
    if world.delayed is not None:
        return condition(KIND, "Succeeded", "Unknown", "Publishing", world.delayed)
    if world.published is None:
        text = world.publish_trouble or "the pod succeeded, but it staged no version.json and no files in storage"
        return condition(KIND, "Succeeded", "False", "ResultMissing", text)
    manifest, digest = world.published
    ready = find(world.adapter.status.conditions, "Ready") if world.adapter is not None else None
    artifact = world.adapter.artifact if world.adapter is not None else None
    if world.adapter is not None and (artifact is None or artifact.digest != digest):
        other = artifact.digest if artifact is not None else "a composed or imported version"
        text = (
            f"Adapter {world.adapter.metadata.name} already exists for another artifact ({other}). Create the job again "
            "with another spec.output.version"
        )
        return condition(KIND, "Succeeded", "False", "ArtifactInvalid", text)
    if ready is not None and ready.reason == "Rejected":
        return condition(KIND, "Succeeded", "False", "GateFailed", ready.message)
    if ready is not None and ready.reason == "SigningKeyUnavailable":
        return condition(KIND, "Succeeded", "Unknown", "Publishing", ready.message)
    if ready is None or ready.status == "Unknown":
        return condition(KIND, "Succeeded", "Unknown", "Publishing", "the operator verifies the published files")
    if ready.status != "True":
        return condition(KIND, "Succeeded", "False", "ArtifactInvalid", ready.message)
    scores = ", ".join(f"{key} {value:.4g}" for key, value in sorted(manifest.metrics.items()))
    text = f"Adapter {manifest.adapter}-{manifest.version}: {scores or 'not measured'}"
    if world.progress is not None and world.progress.missing:
        text += f"; not measured: {'; '.join(world.progress.missing)}"
    return condition(KIND, "Succeeded", "True", "Published", text)


def _attempts(world: World) -> list[Attempt]:
    if world.preflight:  # the preflight Job is not an attempt
        return world.job.status.attempts or []
    attempts = {item.pod: item for item in world.job.status.attempts or []}
    several = any(pods.index(pod) for pod in world.pods)
    for pod in world.pods:
        name, end, done = pods.name(pod), pods.ending(pod), pods.phase(pod) == "Succeeded"
        finished = [
            state["finishedAt"]
            for item in pods.statuses(pod)
            if (state := item.get("state", {}).get("terminated")) and state.get("finishedAt")
        ]
        over = done or pods.phase(pod) == "Failed"
        reason = "Completed" if done else end.reason if over and end is not None else None
        if over and not done and pods.disrupted(pod):
            reason = "Preempted"
        attempts[name] = attempts.get(name, Attempt(pod=name)).model_copy(
            update={
                "index": pods.index(pod) if several else None,
                "started_at": pod.get("status", {}).get("startTime"),
                "ended_at": max(finished) if over and finished else None,
                "reason": reason,
                "message": end.message[:500] if over and end is not None else None,
            }
        )
    there = {pods.name(pod) for pod in world.pods}
    for name, attempt in attempts.items():
        if name not in there and attempt.reason is None:  # pods are removed by a suspension, or when their node is lost
            attempts[name] = attempt.model_copy(update={"reason": Reason.INTERRUPTED, "message": "the pod was removed"})
    progress = world.progress
    if progress is not None and progress.attempt in attempts:
        known = progress.training or {}
        attempts[progress.attempt] = attempts[progress.attempt].model_copy(
            update={
                "resumed_from": progress.resumed_from,
                "micro_batch": _whole(known.get("perDeviceTrainBatchSize")),
                "accumulation": _whole(known.get("gradientAccumulationSteps")),
            }
        )
    return sorted(attempts.values(), key=lambda item: (item.started_at or "~", item.index or 0))


def _whole(value: object) -> int | None:
    """Return a hyperparameter that is a whole number. None for any other value: a pod wrote it."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
