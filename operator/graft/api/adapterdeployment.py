"""AdapterDeployment: adapters that are served on one base model, behind the gateway."""

from typing import Any, Literal

from pydantic import Field

from graft.api.deploymentstatus import AdapterDeploymentStatus
from graft.api.engineargs import ENGINE_ARGS_RULES
from graft.api.meta import AMOUNT, Placement, Resource, Resources, Schema, rules
from graft.api.patterns import (
    ADAPTER_REF,
    CHAT_TEMPLATE,
    DNS_LABEL,
    DNS_NAME,
    ENGINE_ARG,
    MODEL_NAME,
    PARSER_NAME,
    PROMETHEUS_URL,
)
from graft.api.podtemplate import PodTemplate
from graft.api.quantity import quantity


class Route(Schema):
    """One model name that clients use: `<namespace>/<model>`."""

    model: str = Field(
        pattern=MODEL_NAME,
        max_length=63,
        description="Second part of the model name. Clients send <namespace>/<model> in the field model.",
    )
    adapter: str | None = Field(
        default=None,
        pattern=DNS_LABEL,
        max_length=40,
        description="Name of the adapter that answers. It must be listed in spec.adapters. If adapter and sequence are absent, "
        "the base model answers.",
    )
    sequence: list[str] | None = Field(
        default=None,
        min_length=2,
        max_length=4,
        description="Adapters that work on a request one after the other, instead of adapter. Each one gets the answer of the "
        "previous one as its question.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            "items": {"type": "string", "pattern": DNS_LABEL, "maxLength": 40},
        },
    )


class EngineLimits(Schema):
    """Limits of one engine process."""

    max_loras: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Number of adapters in one batch. 8 when absent. More adapters can be attached; the engine swaps them.",
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=64, description="Highest LoRA rank of an adapter. An adapter with a higher rank is not served."
    )
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Longest sequence in tokens. When absent: the model's context length, or less if that does not fit in memory.",
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="Number of requests in one batch. When absent: as many as fit in the cache."
    )
    adapters_per_replica: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Number of adapters that are attached to one replica. If not all adapters fit, each one is placed on at "
        "least two replicas. When absent, every replica has all adapters.",
    )
    adapter_bytes_per_replica: str | int | None = Field(
        default=None,
        description="Total size of the adapters on one replica, for example 20Gi. The volume that holds them is limited "
        "accordingly. No limit when absent.",
        json_schema_extra=AMOUNT,
    )

    @property
    def adapter_bytes(self) -> int | None:
        """Return adapterBytesPerReplica in bytes, or None if it is absent."""
        given = self.adapter_bytes_per_replica
        return None if given is None else int(quantity(given))


class ScalingTarget(Schema):
    """Load that the autoscaler maintains by adding and removing replicas."""

    requests_per_replica: int | None = Field(
        default=None,
        ge=1,
        description="Running and waiting requests per replica, averaged over the replicas. The gateway counts them.",
    )
    cpu_percent: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="CPU use in percent of the CPU that the engine requests, averaged over the replicas.",
    )


class Autoscaling(Schema):
    """How the number of replicas follows the load."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Lowest number of replicas. 0 lets the deployment sleep when it is idle. The next request wakes it.",
    )
    max_replicas: int = Field(ge=1, le=1000, description="Highest number of replicas.")
    target: ScalingTarget | None = Field(
        default=None,
        description="Load that the autoscaler maintains. Required if maxReplicas is above 1 and above minReplicas. If both "
        "values are set, the one that needs more replicas counts.",
    )
    provider: Literal["hpa", "keda"] = Field(
        default="hpa",
        description="hpa: a HorizontalPodAutoscaler, which needs a metrics API. keda: a ScaledObject, which needs KEDA and, "
        "for requestsPerReplica, the chart's value autoscaling.prometheusUrl.",
    )
    prometheus_url: str | None = Field(
        default=None,
        pattern=PROMETHEUS_URL,
        max_length=512,
        description="Deprecated and ignored. The platform team names the Prometheus in the chart's value "
        "autoscaling.prometheusUrl. Remove the field.",
    )
    idle_seconds: int = Field(
        default=300,
        ge=5,
        le=86400,
        description="If minReplicas is 0, the deployment sleeps after this many seconds without a request.",
    )


class AdapterDeploymentSpec(Placement):
    """Which adapters are served on which base model, and with which resources."""

    base_model: str = Field(pattern=DNS_NAME, max_length=63, description="Name of the BaseModel. Immutable.")
    adapters: list[str] = Field(
        default_factory=list,
        max_length=128,
        description="Adapters of this namespace. name@1.4.2: exactly this version. name@^1: the newest 1.x.y. name@^1.4: the "
        "newest 1.x.y from 1.4.0 on. name@latest: the newest version.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": ADAPTER_REF, "maxLength": 80},
        },
    )
    routes: list[Route] | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Model names that clients use. When absent, each adapter has a route with its own name.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["model"]},
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto",
        description="auto: vllm if resources requests GPUs. If resources is absent: vllm for causal models if the cluster has "
        "GPUs. Otherwise transformers, which is for CPUs and development.",
    )
    tool_call_parser: str | None = Field(
        default=None,
        pattern=PARSER_NAME,
        max_length=64,
        description="Name of vLLM's parser that turns the answers of this base model into tool_calls, for example hermes (Qwen), "
        "llama3_json or mistral. The engine transformers has hermes, llama3_json, llama4_json and mistral. When absent, "
        "requests with tools need tool_choice none.",
    )
    chat_template: str | None = Field(
        default=None,
        pattern=CHAT_TEMPLATE,
        max_length=32768,
        description="Jinja template of chats, instead of the one in the base model's files. For base models without a template. "
        "A version that was tuned with dataset.templates is still asked in the form of its training. A change replaces the "
        "pods one after the other.",
    )
    engine_args: list[str] | None = Field(
        default=None,
        max_length=32,
        description="Further flags of vLLM, for example --enforce-eager or --max-num-batched-tokens=8192. "
        "docs/reference.md#engine-arguments lists the allowed ones, and why others are refused. The engine transformers has "
        "none of them.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": ENGINE_ARG, "maxLength": 512},
        }
        | ENGINE_ARGS_RULES,
    )
    limits: EngineLimits = Field(default_factory=EngineLimits, description="Limits of one engine process.")
    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Number of serving pods. With autoscaling, only the value 0 has an effect: it stops the deployment.",
    )
    autoscaling: Autoscaling | None = Field(
        default=None, description="How the number of replicas follows the load. When absent, spec.replicas is used."
    )
    strategy: Literal["auto", "serverless", "dedicated", "distributed"] = Field(
        default="auto",
        description="serverless: may sleep when idle. dedicated: always runs. distributed: runs on several GPUs with tensor "
        "parallelism. auto chooses by the estimated memory: serverless below 16 GB, dedicated below 64 GB, otherwise "
        "distributed.",
    )
    quantization: Literal["auto", "none", "int8", "int4"] = Field(
        default="auto",
        description="Weights of the base model. none: not quantized. int8: 8 bits (vllm's fp8). int4: 4 bits (bitsandbytes; on "
        "GPUs only if the chart's value serving.vllmInt4 is true). auto: none, or int4 if only int4 fits the GPUs of the cluster.",
    )
    resources: Resources | None = Field(
        default=None,
        description="Resources of the engine container. When absent: the smallest GPUs of the cluster that fit, or 1 CPU and 4Gi "
        "without GPUs.",
    )
    pod_template: PodTemplate | None = Field(
        default=None,
        description="What is added to the serving pods: labels, annotations, affinity, spread, variables, volumes. A change "
        "replaces the pods one after the other.",
    )
    shutdown_seconds: int = Field(
        default=120,
        ge=0,
        le=3600,
        description="Seconds that a pod has to finish its running requests before it is stopped.",
    )
    drain_seconds: int = Field(
        default=10,
        ge=0,
        le=3600,
        description="An adapter that is no longer wanted is unloaded after this many seconds without a request.",
    )


class AdapterDeployment(Resource):
    """Adapters that are served on one base model, behind the gateway."""

    spec: AdapterDeploymentSpec
    status: AdapterDeploymentStatus = Field(default_factory=lambda: AdapterDeploymentStatus(conditions=[]))


CRD: dict[str, Any] = {
    "kind": "AdapterDeployment",
    "plural": "adapterdeployments",
    "shortNames": ["ade"],
    "scope": "Namespaced",
    "scale": {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    },
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Model", "string", ".spec.baseModel", 0),
        ("Engine", "string", ".status.engine", 0),
        ("Ready", "string", ".status.readyText", 0),
        ("Adapters", "string", ".status.adaptersText", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Message", "string", ".status.conditions[?(@.type=='Available')].message", 1),
    ],
    "rules": rules(
        (
            "self.metadata.name.size() <= 45",
            "metadata.name must be at most 45 characters, because the names of the Deployment and its pods contain it",
        ),
    ),
    "spec_rules": rules(
        ("self.baseModel == oldSelf.baseModel", "baseModel is immutable: create another AdapterDeployment"),
        (
            "!has(self.routes) || self.routes.all(r, !has(r.adapter) || self.adapters.exists(a, a.startsWith(r.adapter + '@')))",
            "each route's adapter must be one of adapters",
        ),
        (
            "!has(self.routes) || self.routes.all(r, !has(r.sequence) || r.sequence.all(s, self.adapters.exists(a, a.startsWith(s + '@'))))",
            "each adapter of a route's sequence must be one of adapters",
        ),
        (
            "!has(self.routes) || self.routes.all(r, !has(r.adapter) || !has(r.sequence))",
            "a route may have an adapter or a sequence, not both; without either, the base model answers",
        ),
        (
            "self.adapters.all(a, self.adapters.exists_one(b, b.startsWith(a.split('@')[0] + '@')))",
            "adapters: name each adapter once",
        ),
        (
            "!has(self.limits) || !has(self.limits.adapterBytesPerReplica) || !isQuantity(string(self.limits.adapterBytesPerReplica))"
            " || quantity(string(self.limits.adapterBytesPerReplica)).compareTo(quantity('1Mi')) >= 0",
            "limits.adapterBytesPerReplica must be at least 1Mi",
        ),
        (
            "self.adapters.size() > 0 || has(self.routes)",
            "nothing to serve: give adapters, or routes to the base model",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.minReplicas <= self.autoscaling.maxReplicas",
            "autoscaling: minReplicas must not be above maxReplicas",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.maxReplicas <= 1 || self.autoscaling.minReplicas == self.autoscaling.maxReplicas"
            " || (has(self.autoscaling.target)"
            " && (has(self.autoscaling.target.requestsPerReplica) || has(self.autoscaling.target.cpuPercent)))",
            "autoscaling.target: give requestsPerReplica or cpuPercent",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.provider != 'keda' || self.autoscaling.minReplicas >= 1",
            "autoscaling: provider keda does not support minReplicas 0: use provider hpa, or minReplicas of at least 1",
        ),
        (
            "self.strategy != 'serverless' || (has(self.autoscaling) && self.autoscaling.minReplicas == 0)",
            "strategy serverless needs autoscaling with minReplicas 0, so that it can sleep when it is idle",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.minReplicas > 0 || self.strategy in ['auto', 'serverless']",
            "autoscaling.minReplicas 0 needs strategy serverless, or strategy auto with a model that is small enough",
        ),
    ),
}
