"""AdapterDeployment: adapters served on one base model, behind the gateway."""

from typing import Any, Literal

from pydantic import Field

from graft.api.meta import (
    DNS_LABEL,
    QUANTITY,
    Conditions,
    Placement,
    Resource,
    Resources,
    Schema,
    Status,
    rules,
)
from graft.api.quantity import quantity

ADAPTER_REF = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?@(latest|\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2})$"


class Route(Schema):
    """One model name that clients use: `<namespace>/<model>`."""

    model: str = Field(
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        max_length=63,
        description="Clients send <namespace>/<model> in the model field.",
    )
    adapter: str | None = Field(
        default=None,
        pattern=DNS_LABEL,
        max_length=40,
        description="The adapter that answers, one of those in adapters; the bare base model when absent.",
    )
    sequence: list[str] | None = Field(
        default=None,
        min_length=2,
        max_length=4,
        description="Instead of adapter: adapters that work on a request one after the other; each one's answer is the next one's question.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            "items": {"type": "string", "pattern": DNS_LABEL, "maxLength": 40},
        },
    )


class EngineLimits(Schema):
    """What one engine process holds."""

    max_loras: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Adapters in one batch, 8 when absent; more may be attached, the engine swaps them.",
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=64, description="Highest rank of an adapter."
    )
    max_model_len: int | None = Field(
        default=None, ge=16, description="Longest sequence, in tokens; the model's own when absent."
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="Requests in one batch; what the cache has room for, when absent."
    )
    adapters_per_replica: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Adapters attached to one replica. Where not all fit, each is put on at least two replicas; all are on each when absent.",
    )
    adapter_bytes_per_replica: str | int | None = Field(
        default=None,
        description="Size of the adapters of one replica, for example 20Gi: the limit of the volume that holds them.",
        json_schema_extra={
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": QUANTITY,
        },
    )

    @property
    def adapter_bytes(self) -> int | None:
        """adapterBytesPerReplica as a number."""
        given = self.adapter_bytes_per_replica
        return None if given is None else int(quantity(given))


class ScalingTarget(Schema):
    """What the autoscaler holds by adding and removing replicas."""

    requests_per_replica: int | None = Field(
        default=None,
        ge=1,
        description="Requests of a replica that run or wait, on average over the replicas, as the gateway counts them.",
    )
    cpu_percent: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Use of the CPU that the engine requests, on average over the replicas.",
    )


class Autoscaling(Schema):
    """How the number of replicas follows the load."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Fewest replicas. 0 lets the deployment sleep when it is idle; the next request wakes it.",
    )
    max_replicas: int = Field(ge=1, le=1000, description="Most replicas.")
    target: ScalingTarget | None = Field(
        default=None,
        description="What is held; needed for more than one replica. The larger number wins where there are both.",
    )
    provider: Literal["hpa", "keda"] = Field(
        default="hpa",
        description="hpa: a HorizontalPodAutoscaler, which needs a metrics API. keda: a ScaledObject, which needs KEDA and Prometheus.",
    )
    prometheus_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        max_length=512,
        description="Of the Prometheus that scrapes the gateway; needed by keda for requestsPerReplica.",
    )
    idle_seconds: int = Field(
        default=300,
        ge=5,
        le=86400,
        description="With minReplicas 0: the deployment sleeps after so long without a request.",
    )


class AdapterDeploymentSpec(Placement):
    """What is served, with what."""

    base_model: str = Field(min_length=1, max_length=63, description="Name of the BaseModel. Immutable.")
    adapters: list[str] = Field(
        default_factory=list,
        max_length=128,
        description="Adapters of this namespace: name@1.4.2 (exactly), name@^1 (newest 1.x.y; ^1.4 from 1.4.0 on) or name@latest.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": ADAPTER_REF, "maxLength": 80},
        },
    )
    routes: list[Route] | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Model names that clients use; one per adapter, named as it, when absent.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["model"]},
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto",
        description="auto: vllm on GPUs, asked for or found, else transformers (for CPUs and development).",
    )
    limits: EngineLimits = Field(default_factory=EngineLimits, description="What one engine process holds.")
    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Number of serving pods. With autoscaling only 0 counts: it stops the deployment.",
    )
    autoscaling: Autoscaling | None = Field(
        default=None, description="How the number of replicas follows the load; it is fixed when absent."
    )
    strategy: Literal["auto", "serverless", "dedicated", "distributed"] = Field(
        default="auto",
        description="serverless may sleep, dedicated stays up, distributed is spread over several GPUs by tensor parallelism. "
        "auto: by the estimated memory, under 16 GB, under 64 GB, above.",
    )
    quantization: Literal["auto", "none", "int8", "int4"] = Field(
        default="auto",
        description="Weights of the base model. int8: 8 bits (vllm's fp8). int4: bitsandbytes. "
        "auto: none, or int4 where only that fits the cluster's GPUs.",
    )
    resources: Resources | None = Field(
        default=None,
        description="Of the engine container. When absent: the smallest GPUs of the cluster that fit, or 1 CPU and 4Gi without GPUs.",
    )
    shutdown_seconds: int = Field(
        default=120,
        ge=0,
        le=3600,
        description="A pod that goes away finishes what it is answering for so long.",
    )
    drain_seconds: int = Field(
        default=10,
        ge=0,
        le=3600,
        description="An adapter that is taken away is unloaded when it has been idle for so long.",
    )


class LoadedAdapter(Status):
    """One adapter as one replica sees it."""

    adapter: str = Field(description="Name of the Adapter resource.")
    version: str | None = Field(default=None, description="Its version.")
    digest: str | None = Field(default=None, description="First 12 digits of its manifest's SHA-256.")
    state: str = Field(description="Pending, Loading, Loaded, Draining or Failed.")
    reason: str | None = Field(default=None, description="Why it failed.")
    message: str | None = Field(default=None, description="What happened and what to do.")
    load_seconds: float | None = Field(
        default=None, description="From the decision to fetch it until the engine had it."
    )
    size_bytes: int | None = Field(default=None, description="Bytes of its files on the replica.")


class Replica(Status):
    """One serving pod."""

    pod: str = Field(description="The pod's name.")
    ready: bool = Field(description="Whether it gets traffic.")
    adapters: list[LoadedAdapter] = Field(
        default_factory=list, description="The adapters in it.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


class ResolvedAdapter(Status):
    """What an entry of spec.adapters stands for now."""

    ref: str = Field(description="The entry of spec.adapters.")
    name: str | None = Field(default=None, description="The Adapter resource that it resolves to.")
    version: str | None = Field(default=None, description="The version.")
    digest: str | None = Field(default=None, description="Digest of its manifest.")
    loaded: str | None = Field(default=None, description="Replicas that have it loaded, of those that are to have it.")
    restoring: str | None = Field(
        default=None, description="The Adapter that it will resolve to once its compressed files are restored."
    )
    message: str | None = Field(default=None, description="Why it does not resolve, or is on no replica.")


class RoutedModel(Status):
    """What a client's model name reaches now."""

    model: str = Field(description="The name that clients use.")
    adapter: str | None = Field(default=None, description="The Adapter resource that answers; none for the base model.")
    sequence: list[str] | None = Field(
        default=None,
        description="The Adapter resources of a sequence's steps.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    replicas: int = Field(default=0, description="Replicas that can answer; of a sequence, its scarcest step.")


class ServingSizing(Status):
    """The memory that a replica needs per GPU (or in all, without one), itemised, and what was chosen for it."""

    items: dict[str, int] = Field(default_factory=dict, description="Bytes by what needs them.")
    total_bytes: int = Field(default=0, description="Sum of the items.")
    strategy: str | None = Field(
        default=None, description="serverless, dedicated or distributed; absent without an estimate."
    )
    engine: str = Field(default="transformers", description="vllm or transformers.")
    gpu: str | None = Field(default=None, description="Product name of the GPU; absent on CPUs.")
    gpu_memory_bytes: int | None = Field(default=None, description="Memory of one such GPU.")
    gpus: int = Field(default=0, description="GPUs of each replica.")
    cpus: int | None = Field(default=None, description="CPUs that each replica requests.")
    memory_bytes: int | None = Field(default=None, description="Memory of each replica outside of the GPUs.")
    node_selector: dict[str, str] | None = Field(default=None, description="Label of the nodes that have the GPU.")
    quantization: str = Field(default="none", description="none, int8 or int4.")
    dtype: str | None = Field(
        default=None, description="Type of the weights that are not quantised; the model's own when absent."
    )
    max_model_len: int | None = Field(default=None, description="Longest sequence, in tokens.")
    max_num_seqs: int | None = Field(default=None, description="Requests in one batch.")
    gpu_memory_percent: int | None = Field(default=None, description="Of a GPU's memory that the engine takes.")
    source: str = Field(default="estimate", description="estimate, spec when resources are explicit, or default.")
    basis: str | None = Field(
        default=None, description="Digest of what was decided from; the choice is kept while it is the same."
    )
    message: str | None = Field(default=None, description="The choice in words.")


class AdapterDeploymentStatus(Status):
    """What is served."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(
        default=None,
        description="A summary of the conditions: Waiting, Progressing, Available, Asleep, Degraded, Unavailable.",
    )
    replicas: int = Field(default=0, description="Serving pods.")
    ready_replicas: int = Field(default=0, description="Serving pods that get traffic.")
    ready_text: str | None = Field(default=None, description="Ready of wanted replicas, for kubectl get.")
    adapters_text: str | None = Field(
        default=None, description="Adapters loaded wherever they are to be, of all, for kubectl get."
    )
    selector: str | None = Field(default=None, description="Label selector of the serving pods, for autoscalers.")
    engine: str | None = Field(default=None, description="The engine in force.")
    sizing: ServingSizing | None = Field(default=None, description="What a replica needs, and what was chosen for it.")
    endpoint: str | None = Field(default=None, description="URL of the gateway inside the cluster.")
    adapters: list[ResolvedAdapter] | None = Field(
        default=None,
        description="What the entries of spec.adapters stand for now.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    models: list[RoutedModel] | None = Field(
        default=None,
        description="The model names that clients use.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    replica_status: list[Replica] | None = Field(
        default=None, description="The serving pods.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    conditions: Conditions


class AdapterDeployment(Resource):
    """Adapters served on one base model, behind the gateway."""

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
            "metadata.name must be at most 45 characters: the Deployment and its pods carry it in their names",
        ),
    ),
    "spec_rules": rules(
        ("self.baseModel == oldSelf.baseModel", "baseModel is immutable: make another AdapterDeployment"),
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
            "a route has an adapter or a sequence, not both; neither means the base model",
        ),
        (
            "self.adapters.all(a, self.adapters.exists_one(b, b.startsWith(a.split('@')[0] + '@')))",
            "adapters: name each adapter once",
        ),
        (
            "!has(self.limits) || !has(self.limits.adapterBytesPerReplica) || "
            "quantity(string(self.limits.adapterBytesPerReplica)).compareTo(quantity('1Mi')) >= 0",
            "limits.adapterBytesPerReplica must be at least 1Mi",
        ),
        ("self.adapters.size() > 0 || has(self.routes)", "serve something: give adapters, or routes to the base model"),
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
            "autoscaling: the operator scales to zero, not KEDA: give provider hpa, or minReplicas of at least 1",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.provider != 'keda' || !has(self.autoscaling.target)"
            " || !has(self.autoscaling.target.requestsPerReplica) || has(self.autoscaling.prometheusUrl)",
            "autoscaling.prometheusUrl: KEDA asks Prometheus for the requests; say where it is",
        ),
        (
            "self.strategy != 'serverless' || (has(self.autoscaling) && self.autoscaling.minReplicas == 0)",
            "strategy serverless sleeps when it is idle: give autoscaling with minReplicas 0",
        ),
        (
            "!has(self.autoscaling) || self.autoscaling.minReplicas > 0 || self.strategy in ['auto', 'serverless']",
            "autoscaling.minReplicas 0 is for strategy serverless (or auto, where the model is small enough)",
        ),
    ),
}
