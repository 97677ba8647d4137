"""Build the objects of a FineTuneJob: the ConfigMap with job.json, the Jobs, and for several pods the Service that
connects them."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from graft.api import FineTuneJob
from graft.api.meta import Resources
from graft.artifacts.layout import tenant_of
from graft.artifacts.sources import split_pvc_uri
from graft.contracts.job import RENDEZVOUS_PORT, Choice, CurrentVersion, JobFile, JobIdentity, OutputRef
from graft.contracts.job import Pods as PodsOfRun
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import CONFIGMAP_DIR, JOB_FILE, PVC_DIR, WORK_DIR
from graft.contracts.progress import FATAL_EXIT_CODES, FREE_EXIT_CODES
from graft.manifests.metadata import COMPONENT, OWNER_UID, Manifest, child, labels
from graft.manifests.podspec import (
    PYTHON_ENV,
    STORAGE_MOUNTS,
    USER_ENV,
    container_defaults,
    container_resources,
    field_env,
    huggingface_volume,
    pod_defaults,
    storage_volume,
    tmp_mount,
    tmp_volume,
)
from graft.manifests.podtemplate import merge
from graft.settings import Settings, Spot

# Components: the pods of the run, and the pod that checks the job before them.
TRAINING, PREFLIGHT = "training", "preflight"
METHOD_LABEL = "graft.dev/method"
JOB_FILE_DIGEST = "graft.dev/job-file"  # annotation: the SHA-256 of job.json, which shows a change by hand
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
GRACE_SECONDS = 120  # seconds for the last checkpoint; clouds give spot nodes 30 to 120 seconds
# Measured: 0.25 GiB, and 0.9 GiB in the process that builds the model without weights.
PREPARE_RESOURCES = {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}

FAILURE_POLICY: Manifest = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": FATAL_EXIT_CODES}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": FREE_EXIT_CODES}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}


@dataclass(frozen=True)
class Shape:
    """The pods of a run, as placement chose them or as the spec requires."""

    resources: Resources | None = None
    nodes: int = 1
    node_selector: dict[str, str] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)

    @property
    def gpus(self) -> int:
        return self.resources.gpus() if self.resources is not None else 0

    @property
    def several(self) -> bool:
        """Whether more than one process trains."""
        return self.nodes * max(1, self.gpus) > 1


def job_file_name(job: FineTuneJob) -> str:
    return f"{job.metadata.name}-job"


def host_prefix(job: FineTuneJob) -> str:
    """Return the name of a Job with several pods, whose host names and Service contain it. They are DNS labels (RFC 1035),
    so that they may have no dot, start with a letter, and have at most 63 characters."""
    name = job.metadata.name
    if "." not in name and name[0].isalpha():
        return name
    # The uid keeps apart a job `a.b` and a job `a-b`.
    return f"{'' if name[0].isalpha() else 'j'}{name.replace('.', '-')}"[:50] + f"-{job.metadata.uid[:6]}"


def peers_name(job: FineTuneJob) -> str:
    return f"{host_prefix(job)}-peers"


def first_host(job: FineTuneJob) -> str:
    """Return the DNS name of the pod with index 0.

    The Indexed Job gives pods host names, the headless Service gives the domain.
    """
    return f"{host_prefix(job)}-0.{peers_name(job)}.{job.metadata.namespace}.svc"


def job_file(
    job: FineTuneJob,
    base_model: BaseModelRef,
    version: str,
    recipe: str,
    settings: Settings,
    *,
    shape: Shape,
    task: Literal["causal", "seq2seq"] = "causal",
    current: CurrentVersion | None = None,
) -> JobFile:
    """Return the contents of job.json for the training pods."""
    return JobFile(
        job=JobIdentity(
            name=job.metadata.name,
            namespace=job.metadata.namespace,
            uid=job.metadata.uid,
            created_at=job.metadata.creation_timestamp,
        ),
        tenant=tenant_of(job.metadata.namespace),
        base_model=base_model,
        dataset=job.spec.dataset,
        method=job.spec.method,
        training=job.spec.training,
        evaluation=job.spec.evaluation,
        output=OutputRef(adapter=job.spec.output.adapter, version=version),
        recipe=recipe,
        task=task,
        pods=PodsOfRun(
            nodes=shape.nodes,
            processes_per_node=max(1, shape.gpus),
            first_host=first_host(job) if shape.nodes > 1 else None,
        ),
        choice=shape.choice,
        preflight=shape.gpus > 0,
        current=current,
        hf_endpoint=settings.huggingface_endpoint,
        trainer_image=settings.images.trainer,
    )


def config_map(job: FineTuneJob, file: JobFile) -> Manifest:
    """Return the ConfigMap that holds job.json."""
    return with_job_file(child("v1", "ConfigMap", job_file_name(job), job, TRAINING), file.json_text())


def with_job_file(config_map: Manifest, text: str) -> Manifest:
    """Return a ConfigMap with job.json, and with the annotation for `is_edited`."""
    annotations = {JOB_FILE_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    return config_map | {"metadata": config_map["metadata"] | {"annotations": annotations}, "data": {"job.json": text}}


def is_edited(live: Manifest) -> bool:
    """Return whether job.json is not as it was written. A ConfigMap of an earlier release does not say how it was."""
    written = (live["metadata"].get("annotations") or {}).get(JOB_FILE_DIGEST)
    text = str((live.get("data") or {}).get("job.json"))
    return written not in {None, hashlib.sha256(text.encode()).hexdigest()}


def peers_service(job: FineTuneJob) -> Manifest:
    """Return the headless Service. The pods of a run find the pod with index 0 through it, before any pod is Ready."""
    return child("v1", "Service", peers_name(job), job, TRAINING) | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {OWNER_UID: job.metadata.uid},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"}],
        }
    }


def data_uris(job: FineTuneJob) -> list[tuple[str, str]]:
    """Return (path in the spec, URI) of every file that the job reads besides its base model."""
    dataset, suites = job.spec.dataset, job.spec.evaluation.suites or []
    named = [("dataset.train", dataset.train.uri)]
    if dataset.eval is not None:
        named.append(("dataset.eval", dataset.eval.uri))
    for suite in suites:
        sources = [suite.uri] if suite.lm_eval is None else [suite.lm_eval.definition, suite.lm_eval.data]
        named += [(f"evaluation.suites[{suite.name}]", uri) for uri in sources if uri is not None]
    return named


def mounted_volumes(uris: list[str]) -> tuple[list[Manifest], list[Manifest]]:
    """Return volumes and mounts of the claims and ConfigMaps that the URIs name."""
    claims = sorted({split_pvc_uri(uri)[0] for uri in uris if uri.startswith("pvc://")})
    maps = sorted(
        {uri.removeprefix("configMap://").partition("/")[0] for uri in uris if uri.startswith("configMap://")}
    )
    volumes: list[Manifest] = [
        {"name": f"pvc-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for number, claim in enumerate(claims)
    ] + [{"name": f"configmap-{number}", "configMap": {"name": name}} for number, name in enumerate(maps)]
    mounts: list[Manifest] = [
        {"name": f"pvc-{number}", "mountPath": f"{PVC_DIR}/{claim}", "readOnly": True}
        for number, claim in enumerate(claims)
    ] + [
        {"name": f"configmap-{number}", "mountPath": f"{CONFIGMAP_DIR}/{name}", "readOnly": True}
        for number, name in enumerate(maps)
    ]
    return volumes, mounts


def _spot(spot: Spot) -> Manifest:
    """Prefer spot nodes, by the labels of all configured clouds, and tolerate their taints."""
    preferred = [
        {"weight": 100, "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}}
        for key, value in sorted(spot.labels.items())
    ]
    return {
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
        "tolerations": [{"key": taint, "operator": "Exists"} for taint in spot.taints],
    }


def preflight_name(job: FineTuneJob) -> str:
    return f"{job.metadata.name}-preflight"


def is_preflight(child: Manifest) -> bool:
    """Return whether a Job or a pod of a FineTuneJob is the preflight check that runs before GPUs are reserved."""
    return bool(child["metadata"].get("labels", {}).get(COMPONENT) == PREFLIGHT)


def preflight_job(job: FineTuneJob, base_model: BaseModelRef, settings: Settings) -> Manifest:
    """Return the Job that runs before a Job with GPUs.

    So all errors that `prepare` finds are found before the cluster reserves a GPU for the run. And the facts about the
    data are known when placement chooses the GPUs.
    """
    volumes, mounts = _volumes(job, base_model, settings)
    pod = {
        # It tolerates the taints of GPU nodes, because the spec's nodeSelector may require the nodes of the run's own
        # pods.
        **pod_defaults(settings, job.spec, gpus=1),
        # It has the name of the init container, because it runs the same checks and the operator reads both in the same
        # way.
        "containers": [_container("prepare", "preflight", settings, mounts, PREPARE_RESOURCES)],
        "volumes": [*volumes, tmp_volume("prepare")],
    }
    pod.pop("runtimeClassName", None)  # the runtime class is for GPUs only
    if job.spec.spot:
        pod["tolerations"] += _spot(settings.spot)["tolerations"]
    return _job(job, preflight_name(job), PREFLIGHT, pod, settings, pods=1)


def training_job(job: FineTuneJob, base_model: BaseModelRef, settings: Settings, shape: Shape) -> Manifest:
    """Return the batch/v1 Job: `prepare` as an init container without a GPU, then `train`.

    Several pods make it an Indexed Job.
    """
    volumes, mounts = _volumes(job, base_model, settings)
    volumes += [tmp_volume("prepare"), tmp_volume("train")]
    if shape.several:
        # Processes exchange tensors through shared memory. A container's default is only 64 MB.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - an emptyDir
    pod = {
        **pod_defaults(settings, job.spec, gpus=shape.gpus),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "initContainers": [_container("prepare", "prepare", settings, mounts, PREPARE_RESOURCES)],
        "containers": [_container("train", "train", settings, mounts, container_resources(shape.resources))],
        "volumes": volumes,
    }
    if shape.node_selector:
        pod["nodeSelector"] = shape.node_selector | pod.get("nodeSelector", {})
    if job.spec.spot:
        spot = _spot(settings.spot)
        pod["affinity"] = spot["affinity"]
        pod["tolerations"] = pod.get("tolerations", []) + spot["tolerations"]
    if shape.nodes > 1:
        pod["subdomain"] = peers_name(job)
    name = host_prefix(job) if shape.nodes > 1 else job.metadata.name
    manifest = _job(job, name, TRAINING, pod, settings, pods=shape.nodes)
    if job.spec.queue is not None:
        # From here on, Kueue controls spec.suspend: it sets it to false when it admits the job.
        manifest["metadata"]["labels"][QUEUE_LABEL] = job.spec.queue
        manifest["spec"]["suspend"] = True
    return manifest


def _job(job: FineTuneJob, name: str, component: str, pod: Manifest, settings: Settings, *, pods: int) -> Manifest:
    pod_labels = labels(job, component) | {METHOD_LABEL: job.spec.method.name}
    # If one pod is missing or ends, all other pods of the run fail too. So each index gets the retries of the spec.
    limits = {"backoffLimit": job.spec.retries}
    if pods > 1:
        limits = {"backoffLimitPerIndex": job.spec.retries, "maxFailedIndexes": 0}
    template = {"metadata": {"labels": pod_labels}, "spec": pod | {"restartPolicy": "Never"}}
    body: Manifest = {
        **limits,
        "completions": pods,
        "parallelism": pods,
        "completionMode": "Indexed" if pods > 1 else "NonIndexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": FAILURE_POLICY,
        "template": merge(template, settings.training_pods, job.spec.pod_template, ("prepare", "train")),
    }
    if job.spec.active_deadline_seconds is not None:
        body["activeDeadlineSeconds"] = job.spec.active_deadline_seconds
    manifest = child("batch/v1", "Job", name, job, component)
    manifest["metadata"]["labels"] = dict(pod_labels)
    return manifest | {"spec": body}


def _volumes(job: FineTuneJob, base_model: BaseModelRef, settings: Settings) -> tuple[list[Manifest], list[Manifest]]:
    """Return volumes and mounts of every container that reads the job's data. /tmp is not one of them: each container
    has its own."""
    data_volumes, data_mounts = mounted_volumes([base_model.uri] + [uri for _, uri in data_uris(job)])
    mounts: list[Manifest] = [
        {"name": "job", "mountPath": JOB_FILE, "subPath": "job.json", "readOnly": True},
        *STORAGE_MOUNTS,
        {"name": "work", "mountPath": WORK_DIR},
        *data_mounts,
    ]
    volumes: list[Manifest] = [
        {"name": "job", "configMap": {"name": job_file_name(job)}},
        storage_volume(settings),
        huggingface_volume(),
        {"name": "work", "emptyDir": {}},
        *data_volumes,
    ]
    return volumes, mounts


def _container(name: str, command: str, settings: Settings, mounts: list[Manifest], needs: Manifest) -> Manifest:
    return {
        **container_defaults(name),
        "image": settings.images.trainer,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "graft_trainer", command],
        "env": [
            *PYTHON_ENV,
            *USER_ENV,
            field_env("POD_NAME", "metadata.name"),
            {"name": "HF_HUB_DISABLE_TELEMETRY", "value": "1"},
        ],
        "resources": needs,
        "volumeMounts": [*mounts, tmp_mount(name)],
    }
