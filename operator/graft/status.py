"""Conditions and their reasons (PURE).

The conventions follow Kueue. A condition always carries observedGeneration, a reason from REASONS and a message that
says what to do. lastTransitionTime changes only together with the status. Messages are cut to MESSAGE_LIMIT characters.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from graft.api.meta import Condition

Truth = Literal["True", "False", "Unknown"]
MESSAGE_LIMIT = 1024  # characters

# kind -> condition type -> reason -> meaning. docs/reference.md is generated from it. A test checks that the reconcilers use
# no other reason.
REASONS: dict[str, dict[str, dict[str, str]]] = {
    "BaseModel": {
        "Ready": {
            "Resolved": "The model exists. status shows its revision or digest, and its facts.",
            "NotInspected": "The operator cannot read a pvc:// source. Only the pods that mount the claim read it. Facts come from spec.facts only.",
            "SourceUnavailable": "The source did not answer. The operator retries.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "SourceInvalid": "The source has no usable model: no config.json, no safetensors weights, no access, or a model that does not match spec.task.",
            "SourceChanged": "The source has changed since it was resolved. A revision of a hub stays pinned to its commit. Files in object storage are replaced: running jobs keep the old digest, and fail if they still have to download the files.",
        },
    },
    "Tenant": {
        "Ready": {
            "AsExpected": "Every namespace of the tenant is isolated, and its members have their roles there.",
            "NamespaceMissing": "A namespace in spec.namespaces.names does not exist yet. The others have what the spec says.",
            "StorageUnavailable": "The object store did not answer, so it does not yet know the namespaces and the base models of the tenant. The operator retries.",
            "NamespaceClaimed": "Another, older Tenant has a namespace that this one asks for. The others have what the spec says.",
            "NamespaceNotBound": "The operator may not write in a namespace, because the RoleBinding to graft-tenant is missing.",
            "PrefixTaken": "The bucket has files that an earlier namespace of the same name has left, and spec.namespaces.inherit does not list it. The namespace gets no storage key.",
            "NamespaceReserved": "A namespace in spec.namespaces.names cannot belong to a team: it is Kubernetes' own, the operator's, or its name is reserved.",
            "TenantsDisabled": "The operator has no rights for Tenants. No Tenant has an effect.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "CreationFailed": "The API server refused to create or change an object in a namespace. The operator retries.",
        },
    },
    "FineTuneJob": {
        "Accepted": {
            "Resolved": "The base model, the version and the credentials are available.",
            "BaseModelMissing": "The BaseModel does not exist. The job waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready. The job waits for it.",
            "BaseModelForbidden": "This namespace, or its Tenant, may not use the BaseModel.",
            "SchedulingForbidden": "The spec names a PriorityClass, a RuntimeClass, a taint, or a pod's label or annotation that the platform team has not allowed in the chart's values. The message names the field and the value.",
            "CredentialsMissing": "The namespace has no complete Secret graft-storage, and the operator does not create it.",
            "NamespaceNotBound": "The operator may not write in this namespace, because the RoleBinding to graft-tenant is missing.",
            "NamespaceReserved": "The namespace's name is reserved: its part of the bucket, or its user of the store, belongs to somebody else. Use another namespace.",
            "QuotaExceeded": "The training jobs of the Tenant take all that spec.quotas allows, or older jobs wait before this one. The job starts by itself, the oldest first.",
            "QuotaTooSmall": "The job needs more than spec.quotas of its Tenant allows for all jobs together.",
            "PrefixTaken": "The bucket has files that an earlier namespace of this name has left, and its Tenant does not say that they are taken over.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "StorageUnavailable": "The object store did not answer. The job waits for it.",
            "VersionExists": "The version in spec.output.version is already published.",
            "DoesNotFit": "No GPU or node of this cluster has as much memory as the estimate requires. The message says what would fit.",
            "DatasetOutsideNamespace": "The URI of the dataset is in another tenant's part of the bucket.",
            "CreationFailed": "The API server refused to create a child of the job, for example because of a quota. The operator retries.",
        },
        "Succeeded": {
            "Waiting": "The job cannot start yet. See the condition Accepted.",
            "Pending": "The Job exists, but its pod does not run yet. The message says why.",
            "QuotaExceeded": "A ResourceQuota of the namespace refuses the pod. Kubernetes retries.",
            "Preparing": "The pod checks the dataset, the access to storage and the base model.",
            "Training": "The pod trains the model.",
            "Evaluating": "The pod measures the base model and the adapter on the held-out examples and the suites.",
            "Publishing": "The adapter is uploaded and verified.",
            "Retrying": "A pod failed. Another attempt follows.",
            "Published": "The adapter is published.",
            "DatasetInvalid": "A line of the dataset does not match its format.",
            "DatasetUnavailable": "The dataset does not exist, or this namespace's key cannot read it.",
            "BaseModelUnavailable": "The files of the base model do not exist, or have changed since they were resolved.",
            "BaseModelInvalid": "The base model cannot be loaded.",
            "ConfigurationInvalid": "The method or the hyperparameters do not fit the model, or the training diverged: the loss is no longer a number.",
            "UploadFailed": "The object store refused the adapter, because access is denied or the store is full.",
            "VersionExists": "Another run published the version first.",
            "StorageDenied": "The object store refuses this namespace's key.",
            "StorageUnavailable": "The object store did not answer, and the retries are used up.",
            "OutOfMemory": "The training does not fit in memory, even with one example at a time.",
            "MemoryExceeded": "The training did not fit in memory. The next attempt halves the micro-batch.",
            "PeerLost": "Another pod of the same run ended. All pods resume from the newest checkpoint.",
            "PeersMissing": "The other pods of the run did not start in time, and the retries are used up.",
            "CommunicationFailed": "The processes of the run could not communicate although none of them had ended, and the retries are used up.",
            "Queued": "Kueue has not admitted the job yet.",
            "Suspended": "spec.suspend is true. When it is set to false, the job resumes from its newest checkpoint.",
            "GateFailed": "The version missed a gate of spec.evaluation. It is published as Rejected and never served.",
            "Interrupted": "The pod was interrupted, and the retries are used up.",
            "DeadlineExceeded": "The job ran for longer than spec.activeDeadlineSeconds.",
            "ArtifactInvalid": "The published files do not match their manifest.",
            "ResultMissing": "The pod succeeded, but its manifest is not in object storage.",
            "InternalError": "An unexpected error. Read the message and the pod's log.",
        },
    },
    "Adapter": {
        "Ready": {
            "Verified": "Every file in storage has the digest that the manifest records.",
            "Verifying": "The operator reads the files and compares them with the manifest.",
            "Rejected": "The version missed a gate of its FineTuneJob. It is kept for comparison and never served.",
            "DigestMismatch": "A file or the manifest differs from what was published.",
            "ManifestInvalid": "The manifest is invalid.",
            "ManifestMissing": "There is no manifest at the artifact's URI.",
            "FileMissing": "A file that the manifest lists is not in storage.",
            "ManifestMismatch": "The manifest is for another adapter, version, base model or method than the spec says.",
            "OutsideNamespace": "The artifact is outside the namespace's own part of the bucket, or the folder to import is in another tenant's part.",
            "StorageUnavailable": "The object store did not answer. The operator retries.",
            "SigningKeyUnavailable": "The operator has no valid key to sign verified versions with. It continues when there is one.",
            "Archived": "The version was unused for retention.compressAfter, so its weights are compressed. They are restored when the version is needed again, for example by a deployment.",
            "Restoring": "The version is needed again. Its weights are decompressed and verified.",
            "Composing": "The parents are chosen, and a Job combines them. The message shows its progress.",
            "Importing": "A Job copies and validates the files. The message shows its progress.",
            "ParentMissing": "A reference in spec.compose.parents matches no Adapter. The composition waits for one.",
            "ParentNotReady": "No version that matches a reference in spec.compose.parents is Ready. The composition waits for one.",
            "ParentsIncompatible": "The parents cannot be combined in this way: their methods, base models, revisions, ranks or modules differ.",
            "ImportInvalid": "The files do not exist, are of a kind that may not be served, or do not fit the base model.",
            "ComposeFailed": "The Job that composes the version failed. The message says why.",
            "ImportFailed": "The Job that imports the version failed. The message says why.",
            "VersionExists": "Another resource published the version before.",
            "BaseModelMissing": "The BaseModel does not exist. A composition or import waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready. A composition or import waits for it.",
            "BaseModelForbidden": "This namespace, or its Tenant, may not use the BaseModel.",
            "SchedulingForbidden": "The spec names a PriorityClass, a RuntimeClass, a taint, or a pod's label or annotation that the platform team has not allowed in the chart's values. The message names the field and the value.",
            "CredentialsMissing": "The namespace has no complete Secret graft-storage, and the operator does not create it.",
            "NamespaceNotBound": "The operator may not write in this namespace, because the RoleBinding to graft-tenant is missing.",
            "NamespaceReserved": "The namespace's name is reserved: its part of the bucket, or its user of the store, belongs to somebody else. Use another namespace.",
            "PrefixTaken": "The bucket has files that an earlier namespace of this name has left, and its Tenant does not say that they are taken over.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "CreationFailed": "The API server refused to create a child of the Adapter, for example because of a quota. The operator retries.",
        },
        "InUse": {
            "Served": "AdapterDeployments serve the version. A deletion waits until they stop.",
            "NotServed": "No AdapterDeployment serves the version.",
        },
        "Retained": {
            "Needed": "A retention policy applies, but the version is needed. The message says by what.",
            "Kept": "A retention policy applies and keeps the version.",
            "Expiring": "The version is unused. It is deleted with its files after status.prunedAfter.",
            "Pruned": "The retention policy deletes the version and its files now.",
        },
    },
    "AdapterDeployment": {
        "Accepted": {
            "Resolved": "The base model and all adapters are available.",
            "BaseModelHeld": "The files of the BaseModel changed, and an adapter does not fit the new files. The pods keep the old files.",
            "BaseModelMissing": "The BaseModel does not exist. The deployment waits for it.",
            "BaseModelNotReady": "The BaseModel is not Ready. The deployment waits for it.",
            "BaseModelForbidden": "This namespace, or its Tenant, may not use the BaseModel.",
            "SchedulingForbidden": "The spec names a PriorityClass, a RuntimeClass, a taint, or a pod's label or annotation that the platform team has not allowed in the chart's values. The message names the field and the value.",
            "AdapterMissing": "An entry of spec.adapters matches no Ready Adapter, or one whose files are being restored. The other adapters are served.",
            "AdapterIncompatible": "An adapter was tuned on another base model or on other files of it, its method is not lora or qlora, or its rank is too high. The other adapters are served.",
            "CredentialsMissing": "The namespace has no complete Secret graft-storage, and the operator does not create it.",
            "GatewayKeysUnavailable": "The operator has no valid keys for the gateways, so no engine would answer them. It continues when there are.",
            "NamespaceNotBound": "The operator may not write in this namespace, because the RoleBinding to graft-tenant is missing.",
            "NamespaceReserved": "The namespace's name is reserved: its part of the bucket, or its user of the store, belongs to somebody else. Use another namespace.",
            "PrefixTaken": "The bucket has files that an earlier namespace of this name has left, and its Tenant does not say that they are taken over.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "StorageUnavailable": "The object store did not answer. The operator retries.",
            "DoesNotFit": "No GPU of this cluster has as much memory as the estimate requires, or the image of vLLM cannot load the quantization. The message says what would fit.",
            "EngineImageMissing": "The deployment needs vLLM, because of spec.engine or of GPUs in spec.resources, and the chart's values name no image of it.",
            "ToolCallParserUnknown": "The engine transformers has no parser with the name in spec.toolCallParser. The message names its parsers.",
            "EngineArgsUnknown": "spec.engineArgs are flags of vLLM, and the deployment has the engine transformers.",
            "AutoscalerMissing": "autoscaling.provider is keda, but KEDA is not installed. The number of replicas stays as it is.",
            "PrometheusMissing": "autoscaling.provider is keda with requestsPerReplica, but the chart names no Prometheus. The number of replicas stays as it is.",
            "CreationFailed": "The API server refused to create a child of the deployment, for example because of a quota. The operator retries.",
        },
        "Available": {
            "Serving": "Every route has a replica that answers it.",
            "Asleep": "The deployment was idle for longer than autoscaling.idleSeconds and sleeps. The next request wakes it.",
            "ScaledToZero": "spec.replicas is 0.",
            "NoReplicaReady": "No serving pod is ready. The message says why.",
            "RouteUnavailable": "A route has no replica that answers it.",
            "NotAccepted": "Nothing can be served. See the condition Accepted.",
        },
        "Progressing": {
            "RollingOut": "Pods are starting, or adapters are being loaded or unloaded.",
            "Complete": "All wanted adapters are loaded.",
            "AdapterFailed": "An adapter cannot be loaded. The other adapters are served.",
        },
        "Degraded": {
            "AsExpected": "Everything in the spec is served, or being rolled out after a change.",
            "NotAccepted": "A part of the spec cannot be served. See the condition Accepted. The rest is served.",
            "AdapterFailed": "A replica cannot load an adapter. The message has the agent's reason. The other adapters are served.",
            "NoRoom": "Adapters are on fewer than two replicas, or on none, because the replicas are full. The message says what to change.",
            "ReplicaUnavailable": "Fewer replicas are ready than before, or the rollout has stopped.",
            "RouteUnavailable": "A route that was served before has no replica that answers it.",
        },
    },
    "ApiKey": {
        "Ready": {
            "Issued": "The key is in the namespace's Secret, and the gateways accept it.",
            "HashGiven": "The gateways accept the keys whose sums spec.sha256 has.",
            "Expired": "The time in spec.expiresAt has passed. The gateways refuse the key.",
            "TooManyKeys": "The namespace has 500 older ApiKeys. No more of them work.",
            "SecretTaken": "The namespace has a Secret graft-api-keys that is not Graft's.",
            "NamespaceNotBound": "The operator may not write in this namespace, because the RoleBinding to graft-tenant is missing.",
            "NamespaceReserved": "The namespace's name is reserved: its part of the bucket, or its user of the store, belongs to somebody else. Use another namespace.",
            "SpecInvalid": "The schema of this version of Graft refuses the stored spec. The message names the field.",
            "CreationFailed": "The API server refused to write the Secret, for example because of a quota. The operator retries.",
        },
        "WithinLimits": {
            "AsExpected": "The key has used less than 80 % of limits.tokensPerMonth.",
            "MonthNearlyUsed": "The key has used 80 % or more of limits.tokensPerMonth.",
            "MonthUsed": "The key has used limits.tokensPerMonth. The gateways refuse its requests until the next month.",
        },
    },
}


def now() -> str:
    """Return the current time in the notation of Kubernetes: RFC 3339, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_left(since: str, allowed: float) -> float:
    """Return how many of `allowed` seconds remain since `since`, a time in the notation of now(). Negative if they have
    passed."""
    begin = datetime.strptime(since, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return allowed - (datetime.now(UTC) - begin).total_seconds()


def condition(kind: str, type_: str, status: Truth, reason: str, message: str) -> Condition:
    """Return a condition for `merge`. Raises KeyError if the reason is not documented in REASONS."""
    REASONS[kind][type_][reason]
    if len(message) > MESSAGE_LIMIT:
        message = message[: MESSAGE_LIMIT - 1] + "…"
    return Condition(type=type_, status=status, reason=reason, message=message, last_transition_time="")


def merge(old: Iterable[Condition], new: Iterable[Condition], generation: int, at: str) -> list[Condition]:
    """Return the new conditions with their generation. If the status of a condition is unchanged, its transition time
    is kept."""
    before = {item.type: item for item in old}
    merged = []
    for item in new:
        previous = before.get(item.type)
        same = previous is not None and previous.status == item.status and previous.last_transition_time
        time = previous.last_transition_time if same and previous is not None else at
        merged.append(item.model_copy(update={"observed_generation": generation, "last_transition_time": time}))
    return merged


# The conditions of kstatus (https://github.com/kubernetes-sigs/cli-utils, pkg/kstatus), which Flux waits for. They are only
# there while they are True, and have the reason and the message of the condition that they follow from.
RECONCILING, STALLED = "Reconciling", "Stalled"
KSTATUS = frozenset({RECONCILING, STALLED})
ABSENT = {"Archived", "Expired", "Restoring"}  # an Adapter or ApiKey that is not Ready, and neither works nor fails
RETRIED = {"SourceUnavailable"}  # a BaseModel that is not Ready, and becomes it without a change of its spec


def with_kstatus(observed: Iterable[Condition]) -> list[Condition]:
    """Return the conditions of a resource with those of kstatus (PURE)."""
    own = [item for item in observed if item.type not in KSTATUS]
    found = next((pair for pair in map(_kstatus, own) if pair and pair[0] == STALLED), None)
    found = found or next((pair for pair in map(_kstatus, own) if pair), None)
    if found is None:
        return own
    type_, cause = found
    return [*own, cause.model_copy(update={"type": type_, "status": "True"})]


def _kstatus(item: Condition) -> tuple[str, Condition] | None:
    """Return the condition of kstatus that follows from one condition, and that condition."""
    match item.type, item.status:
        case (("Succeeded" | "Ready"), "Unknown"):
            return RECONCILING, item
        case "Succeeded", "False":
            return STALLED, item
        case "Ready", "False" if item.reason not in ABSENT:
            return (RECONCILING if item.reason in RETRIED else STALLED), item
        case "Degraded", "True" if item.reason != "NotAccepted":
            return STALLED, item
        case "Accepted", "False":
            return RECONCILING, item
        case "Available", "False" if item.reason != "ScaledToZero":
            return RECONCILING, item
        case "Progressing", "True":
            return RECONCILING, item
    return None


def find(conditions: Iterable[Condition], type_: str) -> Condition | None:
    """Return the condition of a type, or None if there is none."""
    return next((item for item in conditions if item.type == type_), None)


def transitions(old: Iterable[Condition], new: Iterable[Condition]) -> list[Condition]:
    """Return the conditions whose status or reason changed. Each one becomes an Event."""
    before = {item.type: (item.status, item.reason) for item in old}
    return [item for item in new if item.type not in KSTATUS and before.get(item.type) != (item.status, item.reason)]


def duration(seconds: float) -> str:
    """Return seconds in a short readable form: 45s, 3m20s, 2h05m."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
