"""Conditions, their reasons and the stage computed from them (PURE).

Conventions, after Kueue's: a condition always carries observedGeneration, a reason from REASONS and a message that says what to do;
lastTransitionTime changes only with the status; messages are cut at MESSAGE_LIMIT.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from graft.api.meta import Condition

Truth = Literal["True", "False", "Unknown"]
MESSAGE_LIMIT = 1024

# kind -> condition type -> reason -> meaning. docs/reference.md is made from it, and a test holds the reconcilers to it.
REASONS: dict[str, dict[str, dict[str, str]]] = {
    "BaseModel": {
        "Ready": {
            "Resolved": "The model is there; its revision or digest and its facts are in status.",
            "NotInspected": "A pvc:// source is looked at by the pods that mount it; facts come from spec.facts only.",
            "SourceUnavailable": "The source did not answer; it is asked again.",
            "SourceInvalid": "There is no usable model at the source: no config.json, no safetensors, or no access.",
            "SourceChanged": "The files at the source differ from those that were resolved; jobs that run keep the old digest and fail.",
        },
    },
    "FineTuneJob": {
        "Accepted": {
            "Resolved": "The base model, the version and the credentials are there.",
            "BaseModelMissing": "There is no such BaseModel; the job waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready; the job waits for it.",
            "BaseModelForbidden": "The BaseModel may not be used from this namespace.",
            "CredentialsMissing": "The namespace has no Secret graft-storage, and this installation does not issue it.",
            "NamespaceNotBound": "The operator may not write in this namespace: the RoleBinding to graft-tenant is missing.",
            "StorageUnavailable": "The object store did not answer; the job waits for it.",
            "VersionExists": "The version in spec.output.version is published already.",
            "DoesNotFit": "No GPU or node of this cluster has the memory that the estimate asks for; the message says what would do.",
            "DatasetOutsideNamespace": "The dataset's URI lies in another tenant's part of the bucket.",
            "CreationFailed": "A child was refused by the API server, for example by a quota; it is tried again.",
        },
        "Succeeded": {
            "Waiting": "The job waits; see Accepted.",
            "Pending": "The Job is there, its pod does not run yet; the message says why.",
            "QuotaExceeded": "A ResourceQuota of the namespace refuses the pod; it is tried again.",
            "Preparing": "Dataset, access and base model are checked.",
            "Training": "The model is trained.",
            "Evaluating": "Base model and adapter answer the held-out examples.",
            "Publishing": "The adapter is uploaded and verified.",
            "Retrying": "A pod failed; the next attempt follows.",
            "Published": "The adapter is published.",
            "DatasetInvalid": "A line of the dataset does not fit its format.",
            "DatasetUnavailable": "The dataset is not there, or not readable with this namespace's key.",
            "BaseModelUnavailable": "The base model's files are not there, or changed since they were resolved.",
            "BaseModelInvalid": "The base model cannot be loaded.",
            "ConfigurationInvalid": "Method or hyperparameters do not fit the model, or the loss is no number any more.",
            "UploadFailed": "The store refused the adapter: no access, or full.",
            "VersionExists": "Another run published the version first.",
            "StorageDenied": "The store refuses this namespace's key.",
            "StorageUnavailable": "The store did not answer, and the retries are used up.",
            "OutOfMemory": "The training does not fit into memory, not even with one example at a time.",
            "MemoryExceeded": "The training did not fit into memory; the next attempt halves the micro-batch.",
            "PeerLost": "Another pod of the same run ended; all go on from the newest checkpoint.",
            "PeersMissing": "The other pods of the run did not come in time, and the retries are used up.",
            "CommunicationFailed": "The run's processes could not talk to each other although none had ended, and the retries are used up.",
            "Queued": "Kueue has not admitted the job yet.",
            "Suspended": "spec.suspend is true; the job goes on from its newest checkpoint when it is false.",
            "GateFailed": "A gate of spec.evaluation was missed: the version is published as Rejected and never served.",
            "Interrupted": "The pod was stopped, and the retries are used up.",
            "DeadlineExceeded": "The job ran for longer than spec.activeDeadlineSeconds.",
            "ArtifactInvalid": "What was published does not match its manifest.",
            "ResultMissing": "The pod succeeded, but no manifest of it is in storage.",
            "InternalError": "An error nobody foresaw; the message and the pod's log say more.",
        },
    },
    "Adapter": {
        "Ready": {
            "Verified": "Every file in storage has the digest that the manifest says.",
            "Verifying": "The files are read and compared.",
            "Rejected": "The version missed a gate of its FineTuneJob; it is kept for comparison and never served.",
            "DigestMismatch": "A file, or the manifest, is not what was published.",
            "ManifestInvalid": "The manifest makes no sense.",
            "ManifestMissing": "There is no manifest at the artifact's URI.",
            "FileMissing": "A file of the manifest is not in storage.",
            "ManifestMismatch": "The manifest is of another adapter, version or base model than the spec says.",
            "OutsideNamespace": "The artifact, or what is imported, lies in another tenant's part of the bucket.",
            "StorageUnavailable": "The object store did not answer; it is asked again.",
            "SigningKeyUnavailable": "The operator has no usable key to sign verified versions with; it goes on when there is one.",
            "Archived": "Nobody used it for retention.compressAfter: its weights are compressed; a deployment that names it has them restored.",
            "Restoring": "It is wanted again: its weights are decompressed and verified.",
            "Composing": "The parents are chosen, and a Job combines them; the message says how far it is.",
            "Importing": "A Job copies and validates the files; the message says how far it is.",
            "ParentMissing": "A reference in spec.compose.parents stands for no Adapter; the composition waits for one.",
            "ParentNotReady": "No version that a reference in spec.compose.parents allows is Ready; the composition waits for one.",
            "ParentsIncompatible": "The parents cannot be combined so: other methods, base models, revisions, ranks or modules.",
            "ImportInvalid": "The files are none that may be served, or do not fit the base model; or they are not there.",
            "ComposeFailed": "The Job that composes failed; the message says why.",
            "ImportFailed": "The Job that imports failed; the message says why.",
            "VersionExists": "The version was published before, by another resource.",
            "BaseModelMissing": "There is no such BaseModel; a composition or an import waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready; a composition or an import waits for it.",
            "BaseModelForbidden": "The BaseModel may not be used from this namespace.",
            "CredentialsMissing": "The namespace has no Secret graft-storage, and this installation does not issue it.",
            "NamespaceNotBound": "The operator may not write in this namespace: the RoleBinding to graft-tenant is missing.",
            "CreationFailed": "A child was refused by the API server, for example by a quota; it is tried again.",
        },
        "InUse": {
            "Served": "AdapterDeployments serve it; a deletion waits for them.",
            "NotServed": "No AdapterDeployment serves it.",
        },
        "Retained": {
            "Needed": "A retention policy is in force, and somebody needs the version; the message says who.",
            "Kept": "A retention policy is in force, and spares the version.",
            "Expiring": "Nobody uses the version: it is deleted with its files after status.prunedAfter.",
            "Pruned": "The retention policy deletes the version now, and its files with it.",
        },
    },
    "AdapterDeployment": {
        "Accepted": {
            "Resolved": "The base model and every adapter are there.",
            "BaseModelHeld": "The BaseModel's files changed and an adapter does not fit the new ones; the pods stay on the old ones.",
            "BaseModelMissing": "There is no such BaseModel; the deployment waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready; the deployment waits for it.",
            "BaseModelForbidden": "The BaseModel may not be used from this namespace.",
            "AdapterMissing": "An entry of spec.adapters stands for no Ready Adapter, or for one whose files are being restored; the others are served.",
            "AdapterIncompatible": "An adapter was tuned on another base model or other files of it, or has too high a rank; the others are served.",
            "CredentialsMissing": "The namespace has no Secret graft-storage, and this installation does not issue it.",
            "NamespaceNotBound": "The operator may not write in this namespace: the RoleBinding to graft-tenant is missing.",
            "StorageUnavailable": "The object store did not answer.",
            "DoesNotFit": "No GPU of this cluster has the memory that the estimate asks for; the message says what would do.",
            "AutoscalerMissing": "autoscaling.provider is keda, and KEDA is not installed; the replicas stay as they are.",
            "CreationFailed": "A child was refused by the API server, for example by a quota; it is tried again.",
        },
        "Available": {
            "Serving": "Every route has a replica that answers it.",
            "Asleep": "Idle for longer than autoscaling.idleSeconds; the next request wakes it.",
            "ScaledToZero": "spec.replicas is 0.",
            "NoReplicaReady": "No serving pod is ready; the message says why.",
            "RouteUnavailable": "A route has no replica that answers it.",
            "NotAccepted": "Nothing can be served; see Accepted.",
        },
        "Progressing": {
            "RollingOut": "Pods or adapters are on their way.",
            "Complete": "Everything that is wanted is loaded.",
            "AdapterFailed": "An adapter cannot be loaded; the others are served.",
        },
        "Degraded": {
            "AsExpected": "Everything that is asked for is served, or on its way after a change.",
            "NotAccepted": "A part of what is asked for is missing; see Accepted. The rest is served.",
            "AdapterFailed": "A replica cannot load an adapter; the message has the agent's reason. The others are served.",
            "NoRoom": "Adapters are on fewer than two replicas, or on none, for lack of room; the message says what would make room.",
            "ReplicaUnavailable": "Fewer replicas are ready than there were, or the rollout has stopped.",
            "RouteUnavailable": "A route that was served has no replica that answers it.",
        },
    },
}


def now() -> str:
    """The time as Kubernetes writes it: RFC 3339, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_left(since: str, allowed: float) -> float:
    """How many of `allowed` seconds are left of those that began at `since`, a time as now() writes it."""
    begin = datetime.strptime(since, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return allowed - (datetime.now(UTC) - begin).total_seconds()


def condition(kind: str, type_: str, status: Truth, reason: str, message: str) -> Condition:
    """A condition to hand to `merge`; KeyError for a reason that is not documented."""
    REASONS[kind][type_][reason]
    if len(message) > MESSAGE_LIMIT:
        message = message[: MESSAGE_LIMIT - 1] + "…"
    return Condition(type=type_, status=status, reason=reason, message=message, last_transition_time="")


def merge(old: Iterable[Condition], new: Iterable[Condition], generation: int, at: str) -> list[Condition]:
    """The new conditions with their generation; a transition time is kept where the status is the same."""
    before = {item.type: item for item in old}
    merged = []
    for item in new:
        previous = before.get(item.type)
        same = previous is not None and previous.status == item.status and previous.last_transition_time
        time = previous.last_transition_time if same and previous is not None else at
        merged.append(item.model_copy(update={"observed_generation": generation, "last_transition_time": time}))
    return merged


def find(conditions: Iterable[Condition], type_: str) -> Condition | None:
    """The condition of a type, if it is there."""
    return next((item for item in conditions if item.type == type_), None)


def transitions(old: Iterable[Condition], new: Iterable[Condition]) -> list[Condition]:
    """The conditions whose status or reason changed: each is worth one Event."""
    before = {item.type: (item.status, item.reason) for item in old}
    return [item for item in new if before.get(item.type) != (item.status, item.reason)]


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s, 2h05m."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
