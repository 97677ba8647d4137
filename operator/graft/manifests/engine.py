"""Build the engine's container of a serving pod: its command line, probes and resources."""

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.api.meta import GPU
from graft.contracts.addresses import IPV4_ANY, IPV6_ANY
from graft.contracts.mounts import (
    CALLERS_FILE,
    CERTIFICATE_FILE,
    ENGINE_DIR,
    ENGINE_PORT,
    MODULES_DIR,
    PRIVATE_KEY_FILE,
)
from graft.manifests.metadata import Manifest
from graft.manifests.podspec import (
    PYTHON_ENV,
    USER_ENV,
    container_defaults,
    container_resources,
    engine_user,
)
from graft.manifests.podtemplate import literal
from graft.settings import Settings

DEFAULT_MAX_LORAS = 8
HOST_SLOTS = (32, 64, 128)
# vLLM quantises while it loads: 4 bits with bitsandbytes, 8 bits with its fp8. Graft's own engine has bitsandbytes
# only.
QUANTIZATION = {"int4": "bitsandbytes", "int8": "fp8"}
# vLLM would fetch the images of a request from every address that the request names, inside the cluster too. No host has
# this name (RFC 2606). Images inside the request (data: URLs) still work.
NO_DOMAIN = "media.invalid"
# vLLM must not fall back to pickled weights, which a claim can hold. bitsandbytes has a loader of its own. It prefers
# safetensors, too.
LOAD_FORMAT = {"none": "safetensors", "int8": "safetensors", "int4": "bitsandbytes"}
LEAVE_SECONDS = 10  # from the deletion of a pod until every gateway knows of it, with a large margin
CALLERS = f"{ENGINE_DIR}/{CALLERS_FILE}"
VLLM_CALLERS_ENV: list[Manifest] = [
    {"name": "PYTHONPATH", "value": f"{ENGINE_DIR}/{MODULES_DIR}"},
    {"name": "GRAFT_CALLERS", "value": CALLERS},
]
TLS_FLAGS = [
    "--ssl-certfile",
    f"{ENGINE_DIR}/{CERTIFICATE_FILE}",
    "--ssl-keyfile",
    f"{ENGINE_DIR}/{PRIVATE_KEY_FILE}",
]


def host_slots(deployment: AdapterDeployment) -> int:
    """Return the number of adapters that vLLM keeps in host memory: all attached ones, rounded up in steps.

    The steps keep the pods from rolling when an adapter is attached.
    """
    attached = max(len(deployment.spec.adapters), deployment.spec.limits.max_loras or DEFAULT_MAX_LORAS)
    return next((step for step in HOST_SLOTS if step >= attached), attached)


def _engine_arguments(
    deployment: AdapterDeployment, model: str, sizing: ServingSizing, settings: Settings
) -> list[str]:
    """Return the flags that vLLM and Graft's own engine share (with vLLM's names), and the flags of vLLM only."""
    limits = deployment.spec.limits
    arguments = [
        "--served-model-name",
        deployment.spec.base_model,
        # The gateway connects from other pods. The engine answers only callers with a key. `::` listens for both families,
        # and a kernel without IPv6 does not know it.
        "--host",
        IPV6_ANY if settings.ipv6 else IPV4_ANY,
        "--port",
        str(ENGINE_PORT),
        "--max-loras",
        str(limits.max_loras or DEFAULT_MAX_LORAS),
        "--max-lora-rank",
        str(limits.max_lora_rank),
        "--shutdown-timeout",
        str(deployment.spec.shutdown_seconds),
        # The gateway sends the template of a version's prompts. It refuses one that a client sends.
        "--trust-request-chat-template",
    ]
    if sizing.max_model_len:
        arguments += ["--max-model-len", str(sizing.max_model_len)]
    if sizing.max_num_seqs:
        arguments += ["--max-num-seqs", str(sizing.max_num_seqs)]
    if sizing.quantization != "none":
        arguments += ["--quantization", QUANTIZATION[sizing.quantization]]
    if sizing.dtype:
        arguments += ["--dtype", sizing.dtype]
    if deployment.spec.tool_call_parser:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", deployment.spec.tool_call_parser]
    if deployment.spec.chat_template:
        arguments += ["--chat-template", literal(deployment.spec.chat_template)]
    if settings.engine_tls:
        arguments += TLS_FLAGS
    if sizing.engine == "transformers":
        return ["python", "-m", "graft_server.engine", "--model", model, *arguments, "--callers", CALLERS]
    if sizing.gpus > 1:
        arguments += ["--tensor-parallel-size", str(sizing.gpus)]
    if sizing.gpu_memory_percent:
        arguments += ["--gpu-memory-utilization", f"{sizing.gpu_memory_percent / 100:.2f}"]
    arguments += ["--max-cpu-loras", str(host_slots(deployment))]
    arguments += ["--load-format", LOAD_FORMAT[sizing.quantization]]
    arguments += ["--allowed-media-domains", NO_DOMAIN]
    # vLLM's own --api-key guards only /v1, and every key may use every route.
    arguments += ["--middleware", "graft_callers.OnlyCallers"]
    # The spec's flags come first: the last one of a name counts.
    return ["vllm", "serve", model, *map(literal, deployment.spec.engine_args or []), "--enable-lora", *arguments]


def _resources(deployment: AdapterDeployment, sizing: ServingSizing) -> Manifest:
    """Return the spec's resources, else those that placement chose, else the API's default."""
    if deployment.spec.resources is not None or sizing.memory_bytes is None:
        return container_resources(deployment.spec.resources)
    memory = f"{sizing.memory_bytes // 2**30}Gi"
    return {
        "requests": {"cpu": str(sizing.cpus), "memory": memory},
        "limits": {"memory": memory, GPU: str(sizing.gpus)},
    }


def engine_container(
    deployment: AdapterDeployment, model: str, mounts: list[Manifest], settings: Settings, sizing: ServingSizing
) -> Manifest:
    vllm = sizing.engine == "vllm"
    scheme = {"scheme": "HTTPS"} if settings.engine_tls else {}
    probe = {"httpGet": {"path": "/health", "port": "engine", **scheme}}
    return {
        **container_defaults("engine", user=engine_user(settings)),
        "image": settings.images.vllm if vllm else settings.images.engine,
        "imagePullPolicy": settings.image_pull_policy,
        "command": _engine_arguments(deployment, model, sizing, settings),
        "env": [
            *PYTHON_ENV,
            *USER_ENV,
            {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"},
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            *([{"name": "VLLM_NO_USAGE_STATS", "value": "1"}, *VLLM_CALLERS_ENV] if vllm else []),
        ],
        "ports": [{"name": "engine", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "resources": _resources(deployment, sizing),
        # Loading a large model takes long, so the start may take half an hour. After that, six failed liveness probes
        # restart the engine.
        "startupProbe": probe | {"periodSeconds": 2, "failureThreshold": 900, "timeoutSeconds": 5},
        "livenessProbe": probe | {"periodSeconds": 10, "failureThreshold": 6, "timeoutSeconds": 10},
        "readinessProbe": probe | {"periodSeconds": 3, "failureThreshold": 2, "timeoutSeconds": 5},
        # During this sleep, the pod leaves the gateway's table. So no new request reaches an engine that is shutting
        # down.
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_SECONDS}}},
        "volumeMounts": mounts,
    }
