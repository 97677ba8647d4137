"""AdapterDeployment -> its Deployment of serving pods: base model, agent (native sidecar), engine."""

from graft.api import AdapterDeployment
from graft.api.quantity import binary
from graft.artifacts.sources import split_pvc_uri
from graft.contracts import ADAPTERS_DIR, AGENT_PORT, ENGINE_PORT, PVC_DIR, TRUSTED_KEYS, BaseModelRef
from graft.manifests.common import (
    CONTAINER_SECURITY,
    OWNER_UID,
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

DEFAULT_MAX_LORAS = 8
MODELS_DIR = "/models"
BASE_MODEL = "graft.dev/base-model"  # annotation of a pod: the BaseModelRef that it was made with
VOLUME_SPARE = 256 << 20  # bytes of the adapters' volume beyond the adapters: the kubelet evicts a pod that uses more
PROGRESS_SECONDS = 2400  # a little more than the engine has to start
SPREAD_SECONDS = 15  # between two replicas of a rollout, for adapters of the one that went to be loaded elsewhere
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


def engine_of(deployment: AdapterDeployment) -> str:
    """The engine in force: auto means vLLM where GPUs are asked for."""
    if deployment.spec.engine != "auto":
        return deployment.spec.engine
    resources = deployment.spec.resources
    return "vllm" if resources is not None and resources.gpus() > 0 else "transformers"


def pod_selector(deployment: AdapterDeployment) -> dict[str, str]:
    return {OWNER_UID: deployment.metadata.uid}


def _engine_arguments(deployment: AdapterDeployment, model: str) -> list[str]:
    """Flags that vLLM and our engine share (vLLM's names)."""
    limits = deployment.spec.limits
    arguments = [
        "--served-model-name",
        deployment.spec.base_model,
        "--host",
        "0.0.0.0",  # noqa: S104 - the gateway comes from other pods; the NetworkPolicy admits only it
        "--port",
        str(ENGINE_PORT),
        "--max-loras",
        str(limits.max_loras or DEFAULT_MAX_LORAS),
        "--max-lora-rank",
        str(limits.max_lora_rank),
    ]
    if limits.max_model_len:
        arguments += ["--max-model-len", str(limits.max_model_len)]
    if limits.max_num_seqs:
        arguments += ["--max-num-seqs", str(limits.max_num_seqs)]
    if engine_of(deployment) == "vllm":
        gpus = deployment.spec.resources.gpus() if deployment.spec.resources else 0
        return [
            "vllm",
            "serve",
            model,
            "--enable-lora",
            *(["--tensor-parallel-size", str(gpus)] if gpus > 1 else []),
            *arguments,
        ]
    return ["python", "-m", "graft_server.engine", "--model", model, *arguments]


def _engine(deployment: AdapterDeployment, model: str, mounts: list[Manifest], settings: Settings) -> Manifest:
    vllm = engine_of(deployment) == "vllm"
    probe = {"httpGet": {"path": "/health", "port": "engine"}}
    return {
        "name": "engine",
        "image": settings.images.vllm if vllm else settings.images.engine,
        "imagePullPolicy": settings.image_pull_policy,
        "command": _engine_arguments(deployment, model),
        "env": [
            {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - an emptyDir
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            *([{"name": "VLLM_NO_USAGE_STATS", "value": "1"}] if vllm else []),
        ],
        "ports": [{"name": "engine", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "resources": container_resources(deployment.spec.resources),
        "securityContext": CONTAINER_SECURITY,
        # Loading a large model takes long: the start has half an hour, after that three missed probes are too many.
        "startupProbe": probe | {"periodSeconds": 2, "failureThreshold": 900, "timeoutSeconds": 5},
        "livenessProbe": probe | {"periodSeconds": 10, "failureThreshold": 6, "timeoutSeconds": 10},
        "readinessProbe": probe | {"periodSeconds": 3, "failureThreshold": 2, "timeoutSeconds": 5},
        # The pod leaves the gateway's table while this sleeps, so no request meets a closed port.
        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
        "volumeMounts": mounts,
    }


def _agent(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    return {
        "name": "agent",
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
            f"http://127.0.0.1:{ENGINE_PORT}",
            "--port",
            str(AGENT_PORT),
            *(["--cache-bytes", str(size)] if (size := deployment.spec.limits.adapter_bytes) else []),
        ],
        "env": [
            field_env("POD_NAME", "metadata.name"),
            field_env("POD_NAMESPACE", "metadata.namespace"),
            field_env("POD_UID", "metadata.uid"),
        ],
        "ports": [{"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"}],
        "resources": AGENT_RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "agent"},
            "periodSeconds": 2,
            "failureThreshold": 2,
            "timeoutSeconds": 5,
        },
        "livenessProbe": {
            "httpGet": {"path": "/livez", "port": "agent"},
            "initialDelaySeconds": 20,
            "periodSeconds": 10,
            "failureThreshold": 6,
            "timeoutSeconds": 5,
        },
        "volumeMounts": [
            *STORAGE_MOUNTS,
            {"name": "adapters", "mountPath": ADAPTERS_DIR},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
            {"name": "api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True},
        ],
    }


API_VOLUME = {
    # The service account's token, for the agent only: the engine has no credentials at all.
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
        "name": "base-model",
        "image": settings.images.agent,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [
            "python", "-m", "graft_server.agent", "fetch-base",
            "--uri", base_model.uri, *digest, "--target", f"{MODELS_DIR}/base", *endpoint,
        ],
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - an emptyDir
        "resources": FETCH_RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            *STORAGE_MOUNTS,
            {"name": "models", "mountPath": MODELS_DIR},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
        ],
    }  # fmt: skip


def serving_deployment(deployment: AdapterDeployment, base_model: BaseModelRef, settings: Settings) -> Manifest:
    """The apps/v1 Deployment. Adapters are no part of the pod template: attaching one restarts nothing."""
    limits = deployment.spec.limits
    init: list[Manifest] = []
    volumes: list[Manifest] = [
        storage_volume(),
        huggingface_volume(),
        {"name": "models", "emptyDir": {}},
        {
            "name": "adapters",
            "emptyDir": {"sizeLimit": binary(limits.adapter_bytes + VOLUME_SPARE)} if limits.adapter_bytes else {},
        },
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},
        API_VOLUME,
    ]
    mounts: list[Manifest] = [
        {"name": "models", "mountPath": MODELS_DIR, "readOnly": True},
        {"name": "adapters", "mountPath": ADAPTERS_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - an emptyDir
    ]
    if base_model.uri.startswith("pvc://"):
        claim, path = split_pvc_uri(base_model.uri)
        model = f"{PVC_DIR}/{claim}/{path}".rstrip("/")
        volumes.append({"name": "pvc", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "pvc", "mountPath": f"{PVC_DIR}/{claim}", "readOnly": True})
    else:
        model = f"{MODELS_DIR}/base"
        init.append(_fetch_base(base_model, settings))
    manifest = child("apps/v1", "Deployment", serving_name(deployment), deployment, "serving")
    return manifest | {
        "spec": {
            "replicas": deployment.spec.replicas,
            "selector": {"matchLabels": pod_selector(deployment)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": PROGRESS_SECONDS,
            **({"minReadySeconds": SPREAD_SECONDS} if limits.adapters_per_replica or limits.adapter_bytes else {}),
            "template": {
                "metadata": {
                    "labels": labels(deployment, "serving"),
                    "annotations": {BASE_MODEL: base_model.json_text()},
                },
                "spec": {
                    **pod_defaults(settings, deployment.spec),
                    "serviceAccountName": agent_account(deployment),
                    "terminationGracePeriodSeconds": 60,
                    "initContainers": [*init, _agent(deployment, settings)],
                    "containers": [_engine(deployment, model, mounts, settings)],
                    "volumes": volumes,
                },
            },
        }
    }
