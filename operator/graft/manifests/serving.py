"""Build an AdapterDeployment's Deployment of serving pods: base model (init container), agent (native sidecar), engine."""

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.api.meta import Placement
from graft.api.quantity import binary
from graft.artifacts.sources import split_pvc_uri
from graft.contracts.agent import TRUSTED_KEYS
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import (
    ADAPTERS_DIR,
    AGENT_PORT,
    ENGINE_DIR,
    ENGINE_PORT,
    PVC_DIR,
)
from graft.manifests.engine import LEAVE_SECONDS, TLS_FLAGS, engine_container
from graft.manifests.metadata import OWNER_UID, Manifest, child, labels
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
from graft.settings import Settings

EXIT_SECONDS = 10  # for the processes to exit after the last request
NODE, ZONE = "kubernetes.io/hostname", "topology.kubernetes.io/zone"
MODELS_DIR = "/models"
BASE_MODEL = "graft.dev/base-model"  # annotation of a pod: the BaseModelRef that it was created with
# Amazon EKS gives the role of a service account to every container, except to these. The engine must have no credentials.
SKIP_CONTAINERS = "eks.amazonaws.com/skip-containers"
VOLUME_SPARE = 256 << 20  # bytes added to the adapters' volume: the kubelet evicts a pod that exceeds its volume
PROGRESS_SECONDS = 2400  # slightly more than the engine's startup limit
SPREAD_SECONDS = 15  # between two replicas of a rollout, to load the adapters of a removed replica on others
# Who may call the engine. The agent writes this volume before the engine starts, see graft_server.agent.engine.access.
ACCESS_VOLUME = {"name": "access", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
AGENT_RESOURCES = {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}
FETCH_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}


def serving_name(deployment: AdapterDeployment) -> str:
    return deployment.metadata.name


def agent_account(deployment: AdapterDeployment) -> str:
    return f"{deployment.metadata.name}-agent"


def wanted_name(deployment: AdapterDeployment) -> str:
    return f"{deployment.metadata.name}-wanted"


def residency_name(deployment: AdapterDeployment) -> str:
    return f"{deployment.metadata.name}-residency"


def pod_selector(deployment: AdapterDeployment) -> dict[str, str]:
    return {OWNER_UID: deployment.metadata.uid}


def has_tls(pod: Manifest) -> bool:
    """Return whether the engine of a serving pod listens with TLS."""
    return any(TLS_FLAGS[0] in (container.get("command") or []) for container in pod["spec"]["containers"])


def has_parts(deployment: AdapterDeployment) -> bool:
    """Return whether a replica may hold only a part of the adapters."""
    limits = deployment.spec.limits
    return bool(limits.adapters_per_replica or limits.adapter_bytes)


def _agent(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    return {
        **container_defaults("agent"),
        "image": settings.images.agent,
        "imagePullPolicy": settings.image_pull_policy,
        "restartPolicy": "Always",  # a native sidecar: it starts before the engine and ends after it
        "command": [
            "python",
            "-m",
            "graft_server.agent",
            "--wanted-configmap",
            wanted_name(deployment),
            "--residency-configmap",
            residency_name(deployment),
            "--base-model-name",
            deployment.spec.base_model,
            "--trusted-keys",
            f"{settings.namespace}/{TRUSTED_KEYS}",
            "--engine-url",
            f"{'https' if settings.engine_tls else 'http'}://127.0.0.1:{ENGINE_PORT}",
            "--engine-dir",
            ENGINE_DIR,
            "--port",
            str(AGENT_PORT),
            *(["--cache-bytes", str(size)] if (size := deployment.spec.limits.adapter_bytes) else []),
        ],
        "env": [
            *PYTHON_ENV,
            *USER_ENV,
            field_env("POD_NAME", "metadata.name"),
            field_env("POD_NAMESPACE", "metadata.namespace"),
            field_env("POD_UID", "metadata.uid"),
        ],
        "ports": [{"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"}],
        "resources": AGENT_RESOURCES,
        # The kubelet starts the engine after this. By then, the agent has written what the engine reads at its start.
        "startupProbe": {
            "httpGet": {"path": "/livez", "port": "agent"},
            "periodSeconds": 1,
            "failureThreshold": 120,
            "timeoutSeconds": 5,
        },
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "agent"},
            "periodSeconds": 2,
            "failureThreshold": 2,
            "timeoutSeconds": 5,
        },
        "livenessProbe": {
            "httpGet": {"path": "/livez", "port": "agent"},
            "periodSeconds": 10,
            "failureThreshold": 6,
            "timeoutSeconds": 5,
        },
        "volumeMounts": [
            *STORAGE_MOUNTS,
            {"name": "adapters", "mountPath": ADAPTERS_DIR},
            {"name": "access", "mountPath": ENGINE_DIR},
            tmp_mount("agent"),
            {"name": "api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True},
        ],
    }


API_VOLUME = {
    # The service account's token. Only the agent mounts it: the engine has no credentials.
    "name": "api",
    "projected": {
        "defaultMode": 0o440,
        "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ],
    },
}


def _fetch_base(base_model: BaseModelRef, settings: Settings) -> Manifest:
    endpoint = ["--hf-endpoint", settings.huggingface_endpoint] if settings.huggingface_endpoint else []
    digest = ["--digest", base_model.digest] if base_model.digest else []
    return {
        **container_defaults("base-model"),
        "image": settings.images.agent,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [
            "python", "-m", "graft_server.agent", "fetch-base",
            "--uri", base_model.uri, *digest, "--target", f"{MODELS_DIR}/base", *endpoint,
        ],
        "env": [*PYTHON_ENV, *USER_ENV],
        "resources": FETCH_RESOURCES,
        "volumeMounts": [
            *STORAGE_MOUNTS,
            {"name": "models", "mountPath": MODELS_DIR},
            tmp_mount("base-model"),
        ],
    }  # fmt: skip


def _placement(deployment: AdapterDeployment, sizing: ServingSizing) -> Placement:
    """Return the spec's placement. If placement chose a GPU, add the selector of the nodes that have it."""
    spec = deployment.spec
    if spec.resources is not None or not sizing.gpus:
        return spec
    selector = (sizing.node_selector or {}) | (spec.node_selector or {})
    return spec.model_copy(update={"node_selector": selector or None})


def serving_deployment(
    deployment: AdapterDeployment,
    base_model: BaseModelRef,
    settings: Settings,
    sizing: ServingSizing,
    replicas: int | None,
) -> Manifest:
    """Return the apps/v1 Deployment.

    Adapters are not part of the pod template, so attaching one restarts nothing. The base model's pinned URI and digest
    are part of it, so another base model rolls the pods. If `replicas` is None, another field manager sets their
    number.
    """
    limits = deployment.spec.limits
    init: list[Manifest] = []
    volumes: list[Manifest] = [
        storage_volume(settings),
        huggingface_volume(),
        {"name": "models", "emptyDir": {}},
        {
            "name": "adapters",
            "emptyDir": {"sizeLimit": binary(limits.adapter_bytes + VOLUME_SPARE)} if limits.adapter_bytes else {},
        },
        tmp_volume("agent"),
        tmp_volume("engine"),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},
        ACCESS_VOLUME,
        API_VOLUME,
    ]
    mounts: list[Manifest] = [
        {"name": "models", "mountPath": MODELS_DIR, "readOnly": True},
        {"name": "adapters", "mountPath": ADAPTERS_DIR, "readOnly": True},
        {"name": "access", "mountPath": ENGINE_DIR, "readOnly": True},
        tmp_mount("engine"),
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - an emptyDir
    ]
    if base_model.uri.startswith("pvc://"):
        claim, path = split_pvc_uri(base_model.uri)
        model = f"{PVC_DIR}/{claim}/{path}".rstrip("/")
        volumes.append({"name": "pvc", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "pvc", "mountPath": f"{PVC_DIR}/{claim}", "readOnly": True})
    else:
        model = f"{MODELS_DIR}/base"
        volumes.append(tmp_volume("base-model"))
        init.append(_fetch_base(base_model, settings))
    selector = {"matchLabels": pod_selector(deployment)}
    explicit = deployment.spec.resources
    gpus = explicit.gpus() if explicit is not None else sizing.gpus
    manifest = child("apps/v1", "Deployment", serving_name(deployment), deployment, "serving")
    notes = {BASE_MODEL: base_model.json_text()}
    if settings.serving_account_annotations:
        notes[SKIP_CONTAINERS] = "engine"
    template = {
        "metadata": {"labels": labels(deployment, "serving"), "annotations": notes},
        "spec": {
            **pod_defaults(settings, _placement(deployment, sizing), gpus=gpus),
            "serviceAccountName": agent_account(deployment),
            "terminationGracePeriodSeconds": LEAVE_SECONDS + deployment.spec.shutdown_seconds + EXIT_SECONDS,
            **_spread(selector),
            "initContainers": [*init, _agent(deployment, settings)],
            "containers": [engine_container(deployment, model, mounts, settings, sizing)],
            "volumes": volumes,
        },
    }
    return manifest | {
        "spec": {
            **({} if replicas is None else {"replicas": replicas}),
            "selector": selector,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": PROGRESS_SECONDS,
            **({"minReadySeconds": SPREAD_SECONDS} if has_parts(deployment) else {}),
            "template": merge(template, settings.serving_pods, deployment.spec.pod_template, ("engine",)),
        }
    }


def _spread(selector: Manifest) -> Manifest:
    """Return the parts of a pod's spec that spread replicas over nodes and zones, if possible.

    The scheduler ignores nodes that lack the topology key of any soft constraint. So in clusters whose nodes have no
    zone label, a constraint on the zone would also stop the spreading over nodes. An affinity does not have that
    effect.
    """
    constraint = {"maxSkew": 1, "topologyKey": NODE, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector}
    away = {"weight": 100, "podAffinityTerm": {"topologyKey": ZONE, "labelSelector": selector}}
    return {
        "topologySpreadConstraints": [constraint],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [away]}},
    }
