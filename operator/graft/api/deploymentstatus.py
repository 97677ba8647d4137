"""The status of an AdapterDeployment: what is resolved, routed and loaded, and how its replicas are sized."""

from pydantic import Field

from graft.api.meta import Conditions, Status


class LoadedAdapter(Status):
    """State of one adapter on one replica."""

    adapter: str = Field(description="Name of the Adapter resource.")
    version: str | None = Field(default=None, description="Version of the adapter.")
    digest: str | None = Field(default=None, description="First 12 hex digits of the SHA-256 of its manifest.")
    state: str = Field(description="Pending, Loading, Loaded, Draining or Failed.")
    reason: str | None = Field(default=None, description="Why the adapter failed.")
    message: str | None = Field(default=None, description="What happened and what to do about it.")
    load_seconds: float | None = Field(
        default=None, description="Seconds to download the adapter, to load it into the engine and to check its effect."
    )
    size_bytes: int | None = Field(default=None, description="Size of its files on the replica, in bytes.")


class Replica(Status):
    """One serving pod."""

    pod: str = Field(description="Name of the pod.")
    ready: bool = Field(description="Whether the pod gets requests.")
    adapters: list[LoadedAdapter] = Field(
        default_factory=list, description="Adapters on the pod.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


class ResolvedAdapter(Status):
    """The version that an entry of spec.adapters refers to now."""

    ref: str = Field(description="The entry of spec.adapters.")
    name: str | None = Field(default=None, description="Name of the Adapter resource that the entry refers to.")
    version: str | None = Field(default=None, description="Version of the adapter.")
    digest: str | None = Field(default=None, description="Digest of its manifest.")
    loaded: str | None = Field(
        default=None, description="Replicas that have loaded it, out of those that should have it, for example 2/3."
    )
    restoring: str | None = Field(
        default=None,
        description="Name of the Adapter that the entry will refer to when its compressed files are restored.",
    )
    message: str | None = Field(
        default=None, description="Why the entry refers to no version, or why no replica has it."
    )


class RoutedModel(Status):
    """What answers a model name now."""

    model: str = Field(description="Model name that clients use.")
    adapter: str | None = Field(
        default=None, description="Name of the Adapter resource that answers. Absent for the base model."
    )
    sequence: list[str] | None = Field(
        default=None,
        description="Names of the Adapter resources in a sequence.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    replicas: int = Field(
        default=0,
        description="Number of replicas that can answer. For a sequence: of the step with the fewest replicas.",
    )


class ServingSizing(Status):
    """Estimated memory of a replica per GPU (in total without GPUs), itemised, and the resources that were chosen for
    it."""

    items: dict[str, int] = Field(
        default_factory=dict, description="Bytes of each item in the estimate, for example weights."
    )
    total_bytes: int = Field(default=0, description="Sum of the items in bytes.")
    strategy: str | None = Field(
        default=None, description="serverless, dedicated or distributed. Absent without an estimate."
    )
    engine: str = Field(default="transformers", description="vllm or transformers.")
    gpu: str | None = Field(default=None, description="Product name of the GPU. Absent on CPUs.")
    gpu_memory_bytes: int | None = Field(default=None, description="Memory of one GPU in bytes.")
    gpus: int = Field(default=0, description="Number of GPUs of each replica.")
    cpus: int | None = Field(default=None, description="CPUs that each replica requests.")
    memory_bytes: int | None = Field(default=None, description="Memory of each replica besides its GPUs, in bytes.")
    node_selector: dict[str, str] | None = Field(default=None, description="Labels of the nodes that have this GPU.")
    quantization: str = Field(default="none", description="none, int8 or int4.")
    dtype: str | None = Field(
        default=None, description="Data type of the weights that are not quantized. The model's own type when absent."
    )
    max_model_len: int | None = Field(default=None, description="Longest sequence, in tokens.")
    max_num_seqs: int | None = Field(default=None, description="Number of requests in one batch.")
    gpu_memory_percent: int | None = Field(
        default=None, description="Share of a GPU's memory that the engine uses, in percent."
    )
    source: str = Field(
        default="estimate",
        description="How the resources were chosen: estimate, spec (spec.resources is set) or default.",
    )
    basis: str | None = Field(
        default=None,
        description="Digest of the inputs of the choice. The choice is kept while the inputs stay the same.",
    )
    message: str | None = Field(default=None, description="The choice in words.")


class AdapterDeploymentStatus(Status):
    """What the deployment serves now."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(
        default=None,
        description="Summary of the conditions: Waiting, Progressing, Available, Asleep, Degraded or Unavailable.",
    )
    replicas: int = Field(default=0, description="Number of serving pods.")
    ready_replicas: int = Field(default=0, description="Number of serving pods that get requests.")
    ready_text: str | None = Field(default=None, description="Ready replicas out of the wanted ones, for kubectl get.")
    adapters_text: str | None = Field(
        default=None,
        description="Adapters that are loaded on every replica that should have them, out of all adapters. For kubectl get.",
    )
    selector: str | None = Field(default=None, description="Label selector of the serving pods, for autoscalers.")
    engine: str | None = Field(default=None, description="Engine that the replicas use.")
    sizing: ServingSizing | None = Field(
        default=None, description="Memory estimate of a replica, and the resources that were chosen for it."
    )
    endpoint: str | None = Field(default=None, description="URL of the gateway inside the cluster.")
    adapters: list[ResolvedAdapter] | None = Field(
        default=None,
        description="The versions that the entries of spec.adapters refer to now.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    models: list[RoutedModel] | None = Field(
        default=None,
        description="Model names that clients use, and what answers them.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    replica_status: list[Replica] | None = Field(
        default=None, description="State of each serving pod.", json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    conditions: Conditions
