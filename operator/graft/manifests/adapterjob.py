"""Build the objects that compose or import an Adapter: the ConfigMap with the task, the Job, and its NetworkPolicy."""

from graft.api import Adapter
from graft.api.basemodel import BaseModelStatus, ModelFacts
from graft.api.composition import Compose, Import
from graft.api.meta import Resources
from graft.api.quantity import quantity
from graft.artifacts.layout import tenant_of
from graft.contracts.job import Composition, JobIdentity, OutputRef, ParentVersion, VersionFile
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import JOB_FILE, WORK_DIR
from graft.manifests.metadata import OWNER_UID, Manifest, child, labels
from graft.manifests.network import egress
from graft.manifests.podspec import (
    PYTHON_ENV,
    STORAGE_MOUNTS,
    USER_ENV,
    container_defaults,
    field_env,
    huggingface_volume,
    pod_defaults,
    storage_volume,
    tmp_mount,
    tmp_volume,
)
from graft.manifests.podtemplate import merge
from graft.manifests.training import FAILURE_POLICY, mounted_volumes, with_job_file
from graft.settings import Settings

RETRIES = 3
KEPT_SECONDS = 86400  # seconds after the Job's end, so that its log can be read; nothing else needs the Job
GRACE_SECONDS = 10  # seconds; short, because an interrupted pod saves nothing
MIB = 1024**2
DISK_KEY = "ephemeral-storage"
LIBRARIES = 2048 * MIB  # bytes of memory for torch, transformers and peft, with some working memory
IMPORTER = (
    1024 * MIB
)  # bytes of memory for the import of an adapter, beside the adapter: measured 0.5 GiB and page cache
HIGH_RANK = 64  # most adapters have a lower rank
DISK = 1024 * MIB  # bytes of disk for the caches of libraries and small files
MEASURED = 32 * 1024 * MIB  # bytes of a base model's files that are read at most, to measure one adapter without a GPU


def command(adapter: Adapter) -> str:
    """Return the command for the trainer image: compose or import."""
    return "compose" if adapter.spec.compose is not None else "import"


def job_name(adapter: Adapter) -> str:
    """Return the name of the Job, its ConfigMap and its NetworkPolicy."""
    return f"{adapter.metadata.name}-{command(adapter)}"


def making(adapter: Adapter) -> Compose | Import:
    """Return how the version is made: spec.compose or spec.import."""
    how = adapter.spec.compose or adapter.spec.import_
    if how is None:
        raise ValueError(f"{adapter.metadata.name} has neither spec.compose nor spec.import")
    return how


def unmeasured(adapter: Adapter, base: BaseModelStatus) -> str | None:
    """Return why the pod does not measure the adapter's effect, None if it does (PURE). It then reads the base model's
    weights, but keeps none of them in memory."""
    if base.size_bytes is None:
        return "the size of the base model's files is unknown"
    if base.size_bytes > MEASURED:
        return (
            f"the base model's files have {base.size_bytes / 2**30:.1f} GiB, and a Job without a GPU reads at most "
            f"{MEASURED // 2**30} GiB to measure an adapter"
        )
    how = making(adapter)
    limit = ((how.resources.limits if how.resources else None) or {}).get(DISK_KEY)
    if limit is not None and quantity(limit) < base.size_bytes + DISK:
        field = "spec.compose" if adapter.spec.compose is not None else "spec.import"
        return (
            f"{field}.resources.limits.{DISK_KEY} is too small for the base model's {base.size_bytes / 2**30:.1f} GiB"
        )
    return None


def version_file(
    adapter: Adapter, base_model: BaseModelRef, base: BaseModelStatus, task: str, settings: Settings
) -> VersionFile:
    """Return the contents of job.json for the pod. The parents are the resolved versions in status.parents."""
    spec, meta = adapter.spec, adapter.metadata
    composition = None
    if spec.compose is not None:
        given = spec.compose.model_dump(
            include={"method", "density", "svd_rank", "majority_sign", "seed", "into"}, exclude_none=True
        )
        parents = [ParentVersion.model_validate(item.model_dump()) for item in adapter.status.parents or []]
        composition = Composition(parents=parents, **given)
    return VersionFile.model_validate(
        {
            "job": JobIdentity(name=meta.name, namespace=meta.namespace, uid=meta.uid),
            "tenant": tenant_of(meta.namespace),
            "base_model": base_model,
            "output": OutputRef(adapter=spec.adapter, version=spec.version),
            "method": spec.method,
            "task": task,
            "composition": composition,
            "source": spec.import_.uri if spec.import_ is not None else None,
            "unmeasured": unmeasured(adapter, base),
            "hf_endpoint": settings.huggingface_endpoint,
            "trainer_image": settings.images.trainer,
        }
    )


def config_map(adapter: Adapter, file: VersionFile) -> Manifest:
    """Return the ConfigMap that holds job.json."""
    return with_job_file(child("v1", "ConfigMap", job_name(adapter), adapter, command(adapter)), file.json_text())


def policy(adapter: Adapter, settings: Settings) -> Manifest:
    """Return the NetworkPolicy: no ingress, and egress to DNS, the object store and the hub."""
    return child("networking.k8s.io/v1", "NetworkPolicy", job_name(adapter), adapter, "network") | {
        "spec": {
            "podSelector": {"matchLabels": {OWNER_UID: adapter.metadata.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [],
            "egress": egress(settings),
        }
    }


def resources(adapter: Adapter, base: BaseModelStatus, parents_bytes: int) -> Resources:
    """Return the pod's resources (PURE): no GPU; memory and disk follow from the sizes of the files that it reads and
    writes."""
    how, facts = making(adapter), base.facts
    if how.resources is not None:
        return how.resources
    whole = adapter.spec.method == "full"
    base_bytes = (base.size_bytes or 4 * (facts.parameters or 0 if facts else 0)) if whole else 0
    memory, disk = LIBRARIES, DISK + 2 * base_bytes
    if isinstance(how, Compose):
        # The parents as read, the parents in float32, and the result. 16-bit files take twice their size in float32.
        memory += 6 * parents_bytes + base_bytes + base_bytes // 4
        disk += 3 * parents_bytes
        if (how.method.lower().endswith("svd") or whole) and facts is not None:
            width = max(facts.intermediate_size or 0, facts.hidden_size or 0)
            # One full-size update per parent, their sum and its decomposition, in float32.
            memory += 4 * (facts.hidden_size or 0) * width * (len(how.parents) + 4)
    elif whole or (likely := _likely_bytes(facts)) is None:
        memory += LIBRARIES  # the largest matrix is read at once
        disk += 8 * DISK
    else:
        memory, disk = IMPORTER + likely, DISK + 2 * likely
    if not whole and unmeasured(adapter, base) is None:
        disk += base.size_bytes or 0  # its weights are mapped from the disk, so they take no memory
    return Resources(
        requests={"cpu": "1", "memory": _mebibytes(memory), DISK_KEY: _mebibytes(disk)},
        limits={"memory": _mebibytes(memory)},
    )


def _likely_bytes(facts: ModelFacts | None) -> int | None:
    """Return the size of a LoRA of a high rank on all linear modules, in float32. None if the facts do not give it.

    The size of an adapter is unknown before its download. A module of n x n weights gets 2 x n x rank.
    """
    if facts is None or facts.parameters is None or facts.hidden_size is None:
        return None
    return max(512 * MIB, 4 * facts.parameters * 2 * HIGH_RANK // facts.hidden_size)


def _mebibytes(amount: int) -> str:
    return f"{-(-amount // (64 * MIB)) * 64}Mi"


def job(adapter: Adapter, base_model: BaseModelRef, settings: Settings, needs: Resources) -> Manifest:
    """Return the batch/v1 Job with one container."""
    volumes, mounts = mounted_volumes([base_model.uri])
    container: Manifest = {
        **container_defaults(command(adapter)),
        "image": settings.images.trainer,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "graft_trainer", command(adapter)],
        "env": [
            *PYTHON_ENV,
            *USER_ENV,
            field_env("POD_NAME", "metadata.name"),
            {"name": "HF_HUB_DISABLE_TELEMETRY", "value": "1"},
        ],
        "resources": needs.wire(),
        "volumeMounts": [
            {"name": "job", "mountPath": JOB_FILE, "subPath": "job.json", "readOnly": True},
            *STORAGE_MOUNTS,
            {"name": "work", "mountPath": WORK_DIR},
            tmp_mount(command(adapter)),
            *mounts,
        ],
    }
    pod = {
        **pod_defaults(settings, making(adapter)),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "job", "configMap": {"name": job_name(adapter)}},
            storage_volume(settings),
            huggingface_volume(),
            {"name": "work", "emptyDir": {}},
            tmp_volume(command(adapter)),
            *volumes,
        ],
    }
    template = {"metadata": {"labels": labels(adapter, command(adapter))}, "spec": pod}
    return child("batch/v1", "Job", job_name(adapter), adapter, command(adapter)) | {
        "spec": {
            "backoffLimit": RETRIES,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": FAILURE_POLICY,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": merge(template, settings.training_pods, None, ()),
        }
    }
