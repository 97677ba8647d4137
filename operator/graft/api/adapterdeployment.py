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
        default=None, ge=1, description="Requests in one batch; the engine's default when absent."
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
        default="auto", description="auto: vllm where GPUs are asked for, else transformers (for CPUs and development)."
    )
    limits: EngineLimits = Field(default_factory=EngineLimits, description="What one engine process holds.")
    replicas: int = Field(default=1, ge=0, le=1000, description="Number of serving pods.")
    resources: Resources | None = Field(
        default=None, description="Of the engine container; 1 CPU and 4Gi without a GPU when absent."
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


class AdapterDeploymentStatus(Status):
    """What is served."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(
        default=None, description="A summary of the conditions: Waiting, Progressing, Available, Degraded, Unavailable."
    )
    replicas: int = Field(default=0, description="Serving pods.")
    ready_replicas: int = Field(default=0, description="Serving pods that get traffic.")
    ready_text: str | None = Field(default=None, description="Ready of wanted replicas, for kubectl get.")
    adapters_text: str | None = Field(
        default=None, description="Adapters loaded wherever they are to be, of all, for kubectl get."
    )
    selector: str | None = Field(default=None, description="Label selector of the serving pods, for autoscalers.")
    engine: str | None = Field(default=None, description="The engine in force.")
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
    ),
}
