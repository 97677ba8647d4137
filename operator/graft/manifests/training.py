"""FineTuneJob -> its ConfigMap with job.json and its Job."""

from graft.api import FineTuneJob
from graft.api.meta import Resources
from graft.artifacts.layout import tenant_of
from graft.artifacts.sources import split_pvc_uri
from graft.contracts import (
    CONFIGMAP_DIR,
    FATAL_EXIT_CODES,
    JOB_FILE,
    PVC_DIR,
    WORK_DIR,
    BaseModelRef,
    JobFile,
    JobIdentity,
    OutputRef,
)
from graft.manifests.common import (
    CONTAINER_SECURITY,
    STORAGE_MOUNTS,
    Manifest,
    child,
    container_resources,
    field_env,
    huggingface_volume,
    labels,
    pod_defaults,
    storage_volume,
)
from graft.settings import Settings

METHOD_LABEL = "graft.dev/method"
PREPARE_RESOURCES = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}


def job_file_name(job: FineTuneJob) -> str:
    return f"{job.metadata.name}-job"


def job_file(job: FineTuneJob, base_model: BaseModelRef, version: str, recipe: str, settings: Settings) -> JobFile:
    """What the training pod is told."""
    return JobFile(
        job=JobIdentity(name=job.metadata.name, namespace=job.metadata.namespace, uid=job.metadata.uid),
        tenant=tenant_of(job.metadata.namespace),
        base_model=base_model,
        dataset=job.spec.dataset,
        method=job.spec.method,
        training=job.spec.training,
        evaluation=job.spec.evaluation,
        output=OutputRef(adapter=job.spec.output.adapter, version=version),
        recipe=recipe,
        hf_endpoint=settings.huggingface_endpoint,
        trainer_image=settings.images.trainer,
    )


def config_map(job: FineTuneJob, file: JobFile) -> Manifest:
    """The ConfigMap that holds job.json."""
    return child("v1", "ConfigMap", job_file_name(job), job, "training") | {"data": {"job.json": file.json_text()}}


def _data_volumes(job: FineTuneJob, base_model: BaseModelRef) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes and mounts of the claims and ConfigMaps that the URIs name."""
    uris = [base_model.uri] + [s.uri for s in (job.spec.dataset.train, job.spec.dataset.eval) if s is not None]
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


def training_job(job: FineTuneJob, base_model: BaseModelRef, settings: Settings) -> Manifest:
    """The batch/v1 Job: prepare as an init container without a GPU, then train."""
    resources: Resources | None = job.spec.resources
    data_volumes, data_mounts = _data_volumes(job, base_model)
    mounts: list[Manifest] = [
        {"name": "job", "mountPath": JOB_FILE, "subPath": "job.json", "readOnly": True},
        *STORAGE_MOUNTS,
        {"name": "work", "mountPath": WORK_DIR},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
        *data_mounts,
    ]

    def container(name: str, stage: str, needs: Manifest) -> Manifest:
        return {
            "name": name,
            "image": settings.images.trainer,
            "imagePullPolicy": settings.image_pull_policy,
            "command": ["python", "-m", "graft_trainer", stage],
            "env": [
                field_env("POD_NAME", "metadata.name"),
                {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir
                {"name": "HF_HUB_DISABLE_TELEMETRY", "value": "1"},
            ],
            "resources": needs,
            "securityContext": CONTAINER_SECURITY,
            "terminationMessagePolicy": "File",
            "volumeMounts": mounts,
        }

    pod_labels = labels(job, "training") | {METHOD_LABEL: job.spec.method.name}
    deadline = job.spec.active_deadline_seconds
    spec: Manifest = {
        "backoffLimit": job.spec.retries,
        "completions": 1,
        "parallelism": 1,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": FATAL_EXIT_CODES}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": {"labels": pod_labels},
            "spec": {
                **pod_defaults(settings, job.spec),
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 60,
                "initContainers": [container("prepare", "prepare", PREPARE_RESOURCES)],
                "containers": [container("train", "train", container_resources(resources))],
                "volumes": [
                    {"name": "job", "configMap": {"name": job_file_name(job)}},
                    storage_volume(),
                    huggingface_volume(),
                    {"name": "work", "emptyDir": {}},
                    {"name": "tmp", "emptyDir": {}},
                    *data_volumes,
                ],
            },
        },
    }
    if deadline is not None:
        spec["activeDeadlineSeconds"] = deadline
    manifest = child("batch/v1", "Job", job.metadata.name, job, "training")
    manifest["metadata"]["labels"] = pod_labels
    return manifest | {"spec": spec}
