"""What to do about each reason of a condition (PURE). It knows no resource and no cluster: messages name those.

docs/troubleshooting.md is generated from it and from graft.status.REASONS. Links are relative to docs/.
"""

from graft.contracts.progress import EXIT_CODES, FATAL_EXIT_CODES, FREE_EXIT_CODES
from graft.status import REASONS

# Reasons of resources that work, or that continue by themselves.
NORMAL = frozenset(
    (
        "Archived", "AsExpected", "Asleep", "Complete", "Composing", "Evaluating", "Expiring", "HashGiven", "Importing", "Issued",
        "Kept", "Needed",
        "NotServed", "Preparing", "Pruned", "Published", "Publishing", "Resolved", "Restoring", "RollingOut", "ScaledToZero",
        "Served", "Serving", "Suspended", "Training", "Verified", "Verifying",
    )
)  # fmt: skip

# reason -> remedy, in Markdown.
REMEDIES: dict[str, str] = {
    "AdapterFailed": "Read `status.replicaStatus`: it has the agent's reason for each pod, and [agent.md](agent.md#reasons) says what to do about each. The agent retries with a growing delay.",
    "AdapterIncompatible": "Tune a version on the present files of the BaseModel, or set `baseVersions`; see [lifecycle.md](lifecycle.md#compatibility-with-the-base-model). If the rank is too high, raise `limits.maxLoraRank`.",
    "AdapterMissing": "Check the names with `kubectl get adapters`. If the version is being trained or verified, wait: the deployment continues by itself.",
    "ArtifactInvalid": "Check whether another process wrote below the namespace's prefix. Then raise `spec.restarts`, so that the job publishes again.",
    "AutoscalerMissing": "Install KEDA, or set `autoscaling.provider: hpa`. Meanwhile the pods serve, and their number does not change.",
    "BaseModelForbidden": "Ask the platform team to add the namespace to `allowedNamespaces` of the BaseModel, or the model to `baseModels` of the Tenant. The message says which.",
    "BaseModelHeld": "The pods serve on the old files. Tune a version on the new files, or set `baseVersions`; see [lifecycle.md](lifecycle.md#when-the-files-of-a-basemodel-change).",
    "BaseModelInvalid": "Compare `spec.task` of the BaseModel with the model. Check that all files are complete. A model with its own code (`auto_map`) cannot be used.",
    "BaseModelMissing": "Create the BaseModel. Or correct `spec.baseModel` in a new resource.",
    "BaseModelNotReady": "Run `kubectl describe basemodel` and follow the reason of its condition.",
    "BaseModelUnavailable": "Check that all files exist and that the namespace's key may read them. Base models in S3 must be below `models/` of Graft's bucket. If the files were replaced while the job ran, create the job again.",
    "CommunicationFailed": "Set `NCCL_DEBUG` to `INFO` in `spec.podTemplate.env`, and raise `spec.restarts`, to see the cause in the log. `NCCL_SOCKET_IFNAME` and `GLOO_SOCKET_IFNAME` there name the interface. InfiniBand needs an unlimited memlock. All nodes need the same GPU driver. After a timeout, one pod was stuck, or 5 minutes behind the others.",
    "ComposeFailed": "Correct what the message names, delete the Adapter, and apply it again; see [composition.md](composition.md#what-can-be-seen).",
    "ConfigurationInvalid": "Change the field that the message names, in a new job. If the loss is no longer a number, lower `learningRate`. If the work folder is full, ask for more ephemeral storage.",
    "CreationFailed": "Read the API server's answer in the message. Typical causes are a ResourceQuota, an admission policy, or an object of the same name that Graft did not create.",
    "CredentialsMissing": "Create the Secret `graft-storage` in the namespace, with the keys that the message lists; see [operations.md](operations.md#credentials).",
    "DatasetInvalid": "Correct the lines that the message names, or set `format` and `columns`. `onInvalid: skip` leaves invalid lines out; see [datasets.md](datasets.md).",
    "DatasetOutsideNamespace": "Copy the dataset below `<namespace>/` of the bucket, and name it there in a new job.",
    "DatasetUnavailable": "Check the URI, that the object exists, and that the namespace's key may read it.",
    "DeadlineExceeded": "Raise `activeDeadlineSeconds` and `restarts` in one patch. The job resumes from its newest checkpoint; see [training.md](training.md#a-job-that-failed).",
    "DigestMismatch": "Find out who changed the files. Restore them, save the Adapter's YAML, delete the Adapter (with `deletionPolicy: Retain`) and apply it again. The operator does not repeat this check by itself.",
    "DoesNotFit": "Choose one of the changes that the message names: another method or quantization, smaller limits, other GPUs, or your own `resources`. See [placement.md](placement.md).",
    "EngineImageMissing": "Set `images.vllm.repository` in the chart's values. Or serve on CPUs: set `engine: transformers`, and remove GPUs from `resources`. Pods that run stay as they are.",
    "EngineArgsUnknown": "Remove `engineArgs`, which are flags of vLLM, or set `engine: vllm`. Pods that run stay as they are.",
    "Expired": "Set a later `spec.expiresAt`. Or delete the ApiKey, and give its clients another one.",
    "FileMissing": "Restore the file. The operator checks again by itself, at least every 5 minutes.",
    "GateFailed": "Read the report: it shows the scores beside the gates. Change the data or the recipe in a new job; see [evaluation.md](evaluation.md#gates-and-what-rejected-means).",
    "GatewayKeysUnavailable": "Correct the Secret `graft-gateway-keys` in the operator's namespace: the message says which entry is wrong. Or delete it to get new keys; see [operations.md](operations.md#keys-of-engines).",
    "ImportFailed": "Correct what the message names, delete the Adapter, and apply it again; see [composition.md](composition.md#what-can-be-seen).",
    "ImportInvalid": "Correct the files or `spec.import`, delete the Adapter, and apply it again; see [composition.md](composition.md#importing).",
    "InternalError": "Read the log of the container `train`: it has the traceback. Please report it.",
    "Interrupted": "Raise `spec.restarts`. The job resumes from its newest checkpoint. Evictions and preemptions use no retry.",
    "ManifestInvalid": "Restore the manifest, or publish the version again under another number. A manifest from a newer Graft needs a newer operator.",
    "ManifestMismatch": "Correct the spec: it names another adapter, version, base model or method than the manifest.",
    "ManifestMissing": "Check `spec.artifact.uri`. If the manifest was deleted, restore it: the operator checks again by itself.",
    "MemoryExceeded": "Nothing: the next attempt halves the micro-batch. If the kernel killed the container (exit code 137), the attempt uses a retry: raise `resources.limits.memory` if it happens again.",
    "NamespaceClaimed": "Take the namespace out of `spec.namespaces` of one of the two Tenants that the message names. If a selector matches it, change the selector or the namespace's labels.",
    "NamespaceMissing": "Create the namespace, or remove its name from `spec.namespaces.names`. The operator continues by itself.",
    "MonthNearlyUsed": "Nothing is refused yet. Raise `limits.tokensPerMonth` before it is used up, or let the clients ask for less.",
    "MonthUsed": "Raise `limits.tokensPerMonth`: the gateways follow within seconds. Or wait for the first of the next month, in UTC.",
    "NamespaceNotBound": "Create the RoleBinding: the message contains the command. See [operations.md](operations.md#onboarding-a-namespace).",
    "NamespaceReserved": "Use a namespace with another name; see [operations.md](operations.md#reserved-namespaces).",
    "NoReplicaReady": "The message is that of the pod: no node fits, no image, or the engine ends (`kubectl logs -c engine`).",
    "NoRoom": "Make the change that the message names: more replicas, larger `limits`, or fewer adapters; see [concepts.md](concepts.md#more-adapters-than-one-replica-takes).",
    "NotAccepted": "Follow the reason of the condition `Accepted`.",
    "NotInspected": "Set `spec.facts`, so that memory can be estimated. Without facts, jobs need their own `resources`.",
    "OutOfMemory": "Make one of the changes that the message names, for example a smaller `maxLength`, `qlora`, or a larger GPU. If the kernel killed the container at its memory limit, raise `resources.limits.memory`.",
    "OutsideNamespace": "Copy the files below `<namespace>/` of the bucket, and name them there.",
    "ParentMissing": "Check the references in `spec.compose.parents`. If the version is being trained, wait: the composition continues by itself.",
    "ParentNotReady": "Read the condition `Ready` of the parent. The composition continues by itself when the parent is Ready.",
    "ParentsIncompatible": "Choose other parents or another method; see [composition.md](composition.md#composing). Then delete the Adapter and apply it again.",
    "PeerLost": "Nothing: all pods resume from the newest checkpoint, and no retry is used. `status.attempts` shows which pod ended, and why.",
    "PeersMissing": "Set `spec.queue`: Kueue admits all pods or none. Or free as many GPUs as all pods need.",
    "Pending": "Follow the message of the pod: no node fits (`kubectl describe pod`), an image cannot be pulled, or a Secret or a claim is missing.",
    "PrefixTaken": "Delete the files below `<namespace>/` of the bucket. Or, if it is the same team, list the namespace in `spec.namespaces.inherit` of the Tenant.",
    "PrometheusMissing": "Set `autoscaling.prometheusUrl` in the chart's values, or `autoscaling.provider: hpa`. Meanwhile the pods serve, and their number does not change.",
    "Queued": "Wait for quota, or ask why with `kubectl describe workload`. If Kueue does not run, the job stays queued; see [training.md](training.md#kueue).",
    "QuotaExceeded": "Free or raise the quota that the message names: a ResourceQuota of the namespace, or `spec.quotas` of the Tenant. The job continues by itself.",
    "QuotaTooSmall": "Ask for fewer GPUs in a new job, or ask the platform team to raise `spec.quotas` of the Tenant.",
    "Rejected": "The version is never served. The report of its job shows which gate it missed.",
    "ReplicaUnavailable": "Run `kubectl get pods` and read the message. A rollout that has stopped continues when the cause is removed.",
    "ResultMissing": "Check whether another process deleted files below `runs/`, or whether a rule of the bucket expires them. Then raise `spec.restarts`.",
    "Retrying": "Nothing yet: another attempt resumes from the newest checkpoint. `status.attempts` shows why the last one ended.",
    "RouteUnavailable": "No replica has loaded the adapter of the route. `status.adapters` and `status.replicaStatus` show why.",
    "SchedulingForbidden": "Remove the field that the message names. Or ask the platform team to allow the value in `tenants` of the chart; see [operations.md](operations.md#what-specs-may-ask-for).",
    "SecretTaken": "Rename your Secret `graft-api-keys`. The operator then makes its own, and the key.",
    "SigningKeyUnavailable": "Correct the Secret `graft-signing` in the operator's namespace: the message says what is wrong. See [signatures.md](signatures.md#the-keys).",
    "SourceChanged": "For a hub: name the new commit in `spec.source`, if you want it. For files in a bucket: adapters that were tuned on the old files may not fit; see [lifecycle.md](lifecycle.md#when-the-files-of-a-basemodel-change). Put new weights into a new folder.",
    "SourceInvalid": "Check that the repository and the revision exist, and that `config.json` and safetensors are there. For a gated model, give the operator a token ([operations.md](operations.md#credentials)) or copy the model to the bucket.",
    "SourceUnavailable": "Check the hub or the store, and the operator's way to it. The operator retries every 20 s. A BaseModel that was Ready stays Ready.",
    "SpecInvalid": "The resource is older than the schema of this version. Correct the field that the message names, or delete the resource and create it again.",
    "StorageDenied": "Renew the key in `graft-storage`, or give it the rights that [operations.md](operations.md#credentials) lists. Then raise `spec.restarts`.",
    "StorageUnavailable": "Check that the store runs, that the endpoint is right, and that the operator's key is valid. The operator retries by itself. If a job failed with this reason, raise its `spec.restarts`.",
    "TenantsDisabled": "Set `tenants.enabled: true` in the chart's values; see [several-teams.md](guides/several-teams.md).",
    "TooManyKeys": "Delete ApiKeys that are not used. Several clients may share a key, or use another namespace.",
    "ToolCallParserUnknown": "Use one of the parsers that the message names, or `engine: vllm`. Pods that run stay as they are.",
    "UploadFailed": "Free space in the store, or allow the namespace's key to write. Then raise `spec.restarts`: the last checkpoint is kept.",
    "VersionExists": "Use another number, or `version: auto`.",
    "Waiting": "Follow the reason of the condition `Accepted`.",
}  # fmt: skip

INTRODUCTION = """# Troubleshooting by reason

<!-- Generated by `python -m graft.crdgen` from graft.remedies and graft.status.REASONS. Do not edit. -->

Each condition of a resource has a reason. This page lists every reason with its remedy, in alphabetical order. Read the condition's message first: it names the object, and often the exact change.

```sh
kubectl get graft -A                                     # the stage of everything
kubectl get finetunejob support -n team-a -o wide        # with the message
kubectl describe finetunejob support -n team-a           # conditions and Events
```

[agent.md](agent.md#reasons) lists the reasons of adapters in serving pods. [operations.md](operations.md#troubleshooting) helps where there is no reason, for example with a resource that cannot be deleted.
"""


def after(reason: str) -> str:
    """Return what follows when a training pod ends with `reason`, or an empty text if no pod ends with it."""
    codes = {str(said): code for said, code in EXIT_CODES.items()}
    if (code := codes.get(reason)) is None:
        return ""
    if code in FATAL_EXIT_CODES:
        return f"Exit code {code}. The job fails at once."
    if code in FREE_EXIT_CODES:
        return f"Exit code {code}. Another attempt follows, and no retry is used."
    return f"Exit code {code}. Another attempt follows, until the retries are used up."


def page() -> str:
    """Return docs/troubleshooting.md. Raises KeyError for a reason without a remedy that is not in NORMAL."""
    places: dict[str, dict[str, list[str]]] = {}  # reason -> meaning -> where it stands
    for kind, conditions in REASONS.items():
        for condition, meanings in conditions.items():
            for reason, meaning in meanings.items():
                places.setdefault(reason, {}).setdefault(meaning, []).append(f"{kind} `{condition}`")
    lines = [INTRODUCTION]
    for reason in sorted(places.keys() - NORMAL):
        lines += [f"## {reason}", ""]
        lines += [f"- {', '.join(where)}: {meaning}" for meaning, where in places[reason].items()]
        lines += ["", " ".join(filter(None, (after(reason), f"**Remedy:** {REMEDIES[reason]}"))), ""]
    lines += ["## Reasons that need nothing", "", "| reason | condition | what it means |", "|---|---|---|"]
    for reason in sorted(NORMAL):
        lines += [f"| `{reason}` | {', '.join(where)} | {meaning} |" for meaning, where in places[reason].items()]
    return "\n".join(lines) + "\n"
