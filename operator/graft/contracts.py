"""What the parts say to each other: the files and ConfigMap keys between operator, training pod, agent and gateway.

The Kubernetes API is the only control plane and object storage the only data plane (docs/architecture.md); these models are
the whole traffic between the parts. A reader ignores what it does not know, so parts of neighbouring versions work together.

| message      | written by    | read by       | where                                                            |
|--------------|---------------|---------------|------------------------------------------------------------------|
| JobFile      | operator      | training pod  | ConfigMap key job.json, mounted at /etc/graft/job.json           |
| VersionFile  | operator      | training pod  | the same, for a pod that composes or imports a version           |
| Progress     | training pod  | operator      | object storage, runs/<job-uid>/<attempt>/progress.json           |
| Termination  | training pod  | operator      | the container's termination message, and Progress.failure        |
| Wanted       | operator      | agent         | ConfigMap <deployment>-wanted, key wanted.json                   |
| Residency    | agent         | operator      | ConfigMap <deployment>-residency, one key per pod                |
| Trusted keys | operator      | agents        | ConfigMap graft-trusted-keys of the operator's namespace: key id -> key   |
| Routes       | operator      | gateway       | ConfigMaps labelled graft.dev/component=routes, key routes.json  |
| Demand       | gateway       | operator      | ConfigMap graft-demand, one key per deployment and gateway       |
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from graft.api.adapter import AdapterSignature
from graft.api.composition import CompositionMethod
from graft.api.evaluation import Evaluation
from graft.api.recipe import Dataset, Method, MethodName, Training

# Mounts and ports of the pods.
JOB_FILE = "/etc/graft/job.json"
STORAGE_DIR = "/etc/graft/storage"  # the Secret graft-storage, one file per key
HF_TOKEN_FILE = "/etc/graft/huggingface/token"  # noqa: S105 - a path
WORK_DIR = "/work"  # emptyDir, shared by prepare and train
PVC_DIR = "/mnt/pvc"  # pvc://claim/path is mounted at PVC_DIR/claim
CONFIGMAP_DIR = "/mnt/configmap"  # configMap://name/key is mounted at CONFIGMAP_DIR/name
ADAPTERS_DIR = "/adapters"  # emptyDir, shared by agent (writes) and engine (reads)
ENGINE_PORT = 8000
AGENT_PORT = 8081  # /readyz, /livez, /metrics
GATEWAY_PORT = 8080

STORAGE_SECRET = "graft-storage"  # noqa: S105 - a name
HF_SECRET = "graft-huggingface"  # noqa: S105 - a name

TRUSTED_KEYS = "graft-trusted-keys"  # public keys, in the operator's namespace
WANTED_KEY = "wanted.json"
ROUTES_KEY = "routes.json"
ROUTES_COMPONENT = "routes"
DEMAND_CONFIGMAP = "graft-demand"  # in the operator's namespace
DEMAND_COMPONENT = "demand"


class Message(BaseModel):
    """Base of the messages: camelCase on the wire, unknown fields ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def json_text(self) -> str:
        """The message as JSON text, absent values left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class Reason(StrEnum):
    """Why a training pod failed."""

    DATASET_INVALID = "DatasetInvalid"
    DATASET_UNAVAILABLE = "DatasetUnavailable"
    BASE_MODEL_UNAVAILABLE = "BaseModelUnavailable"
    BASE_MODEL_INVALID = "BaseModelInvalid"
    CONFIGURATION_INVALID = "ConfigurationInvalid"
    UPLOAD_FAILED = "UploadFailed"
    VERSION_EXISTS = "VersionExists"
    STORAGE_DENIED = "StorageDenied"
    OUT_OF_MEMORY = "OutOfMemory"  # at the smallest micro-batch
    MEMORY_EXCEEDED = "MemoryExceeded"  # the next attempt halves the micro-batch
    PEER_LOST = "PeerLost"  # another pod of the same run ended
    PEERS_MISSING = "PeersMissing"  # the others did not come in time
    COMMUNICATION_FAILED = "CommunicationFailed"  # between the processes, and none of them had ended
    ADAPTER_INVALID = "AdapterInvalid"  # what is imported or composed; of no FineTuneJob
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    INTERRUPTED = "Interrupted"
    INTERNAL_ERROR = "InternalError"


# 10-19: the user's to fix, the Job fails at once (podFailurePolicy). 20-29: another attempt follows and none is used up.
# Others count against the retries.
EXIT_CODES: dict[Reason, int] = {
    Reason.DATASET_INVALID: 10,
    Reason.DATASET_UNAVAILABLE: 11,
    Reason.BASE_MODEL_UNAVAILABLE: 12,
    Reason.BASE_MODEL_INVALID: 13,
    Reason.CONFIGURATION_INVALID: 14,
    Reason.UPLOAD_FAILED: 15,
    Reason.VERSION_EXISTS: 16,
    Reason.STORAGE_DENIED: 17,
    Reason.OUT_OF_MEMORY: 18,
    Reason.ADAPTER_INVALID: 19,
    Reason.MEMORY_EXCEEDED: 20,
    Reason.PEER_LOST: 21,
    Reason.STORAGE_UNAVAILABLE: 30,
    Reason.INTERRUPTED: 31,
    Reason.COMMUNICATION_FAILED: 32,
    Reason.PEERS_MISSING: 33,
    Reason.INTERNAL_ERROR: 1,
}
FATAL_EXIT_CODES = sorted(code for code in EXIT_CODES.values() if 10 <= code < 20)
FREE_EXIT_CODES = sorted(code for code in EXIT_CODES.values() if 20 <= code < 30)
RENDEZVOUS_PORT = 29500  # of the first pod of a run with several


class Termination(Message):
    """Why a container ended, in its termination message (Kubernetes keeps 4096 bytes of it)."""

    reason: Reason
    message: str
    remedy: str


class JobIdentity(Message):
    """Whose run this is."""

    name: str
    namespace: str
    uid: str


class BaseModelRef(Message):
    """The base model, pinned."""

    name: str
    uri: str  # hf://org/name@<commit>, s3://… or pvc://…
    digest: str | None = None  # of the listing for s3://; an hf:// URI holds the commit itself
    version: str | None = None  # the BaseModel's spec.version

    @property
    def identity(self) -> str:
        """What tells these files from others; what an Adapter's status.baseModelDigest says of those it was tuned on."""
        return self.digest or self.uri


class OutputRef(Message):
    """The version that is to be published."""

    adapter: str
    version: str


class CurrentVersion(Message):
    """The adapter's newest version, for gates that compare with it."""

    version: str
    uri: str
    digest: str  # of manifest.json


class Pods(Message):
    """The pods of one run. With more than one process in all they find each other at the first pod."""

    nodes: int = 1
    processes_per_node: int = 1  # one per GPU, one without GPUs
    first_host: str | None = None  # DNS name of the first pod; None with one node


class Choice(Message):
    """What placement decided and the spec leaves open; None: the trainer derives it from the device it finds."""

    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    sharding: Literal["ddp", "fsdp"] | None = None


class JobFile(Message):
    """Everything a training pod knows: the spec as the user wrote it, with the references resolved."""

    schema_version: int = 1
    job: JobIdentity
    tenant: str  # first path segment in the bucket
    base_model: BaseModelRef
    dataset: Dataset
    method: Method
    training: Training
    evaluation: Evaluation
    output: OutputRef
    recipe: str
    task: Literal["causal", "seq2seq"] = "causal"
    pods: Pods = Field(default_factory=Pods)
    choice: Choice = Field(default_factory=Choice)
    halvings: int = 0  # how often the micro-batch is to be halved: attempts of this run that ran out of memory
    current: CurrentVersion | None = None
    hf_endpoint: str | None = None
    trainer_image: str = ""


class ParentVersion(Message):
    """A version that is composed with others."""

    name: str  # of the Adapter resource
    version: str
    uri: str
    digest: str  # of manifest.json
    weight: float


class Composition(Message):
    """How versions become one."""

    parents: list[ParentVersion]
    method: CompositionMethod
    density: float | None = None
    svd_rank: int | None = None
    majority_sign: Literal["total", "frequency"] = "total"
    seed: int = 0
    into: Literal["adapter", "base"] = "adapter"


class VersionFile(Message):
    """Everything that a pod knows which makes a version without training: composed, or imported."""

    schema_version: int = 1
    job: JobIdentity  # the Adapter
    tenant: str
    base_model: BaseModelRef
    output: OutputRef
    method: MethodName
    task: Literal["causal", "seq2seq"] = "causal"
    composition: Composition | None = None
    source: str | None = None  # what is imported: hf://… or s3://…/
    hf_endpoint: str | None = None
    trainer_image: str = ""


TrainingStage = Literal["Preparing", "Training", "Evaluating", "Publishing", "Succeeded", "Failed"]


class CheckpointRef(Message):
    """A complete checkpoint in object storage."""

    step: int
    attempt: str
    size_bytes: int
    created_at: str


class DatasetStatistics(Message):
    """What prepare found in the data; lengths in tokens, before truncation where not said otherwise."""

    examples: int = 0
    held_out: int = 0
    invalid: int = 0
    tokens: int = 0  # after truncation
    mean_tokens: float = 0
    median_tokens: int = 0
    p95_tokens: int = 0
    max_tokens: int = 0
    truncated_share: float = 0
    sampled: bool = False  # lengths are those of a part of the examples


class Progress(Message):
    """How far an attempt is; rewritten at most every 5 s and at each change of stage."""

    attempt: str
    stage: TrainingStage
    updated_at: str
    step: int = 0
    total_steps: int = 0
    percent: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    training: dict[str, Any] | None = None  # the resolved hyperparameters, camelCase
    target_modules: list[str] | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    world_size: int | None = None  # processes that train together
    peak_memory_bytes: int | None = None  # of one GPU, or of the process without one
    dataset: DatasetStatistics | None = None
    resumed_from: int | None = None  # step of the checkpoint that this attempt went on from
    checkpoints: list[CheckpointRef] | None = None  # complete ones of the run, oldest first
    metrics: dict[str, float] | None = None
    rejected: list[str] | None = None  # the gates that were missed, in words
    missing: list[str] | None = None  # what could not be measured and why, in words
    manifest_digest: str | None = None  # once published
    failure: Termination | None = None


class WantedAdapter(Message):
    """One adapter that replicas should have loaded."""

    engine_name: str  # <tenant>--<adapter>-<version>--<digest12>
    adapter: str  # name of the Adapter resource
    uri: str
    digest: str  # of manifest.json
    signature: AdapterSignature | None = None  # by the operator, of all of the above; graft.artifacts.signing
    pods: list[str] | None = None  # those that are to have it; None: every replica

    def is_for(self, pod: str) -> bool:
        """Whether the pod is to have it."""
        return self.pods is None or pod in self.pods

    def same_files(self, other: "WantedAdapter") -> bool:
        """Whether they differ in the signature at most: a version that is signed anew is the same version."""
        return self == other.model_copy(update={"signature": self.signature})


class Wanted(Message):
    """What the replicas of a deployment should have loaded.

    Where not everything fits on every replica each adapter names its pods, and `assigned` all pods that were thought of. A pod
    that is not among them waits to be: to be ready without its adapters would end the pods that have them.
    """

    schema_version: int = 1
    base_model: str
    max_lora_rank: int
    drain_seconds: int = 10
    adapters: list[WantedAdapter] = Field(default_factory=list)
    assigned: list[str] | None = None  # None: there is no assignment, every pod takes everything
    # Wanted as soon as they are verified: their files are brought where there is room, and nothing of them is loaded.
    expected: list[WantedAdapter] = Field(default_factory=list)

    def is_for(self, engine_name: str, pod: str) -> bool:
        """Whether the pod is to have the adapter; one that is not wanted yet is for every pod."""
        return all(item.is_for(pod) for item in self.adapters if item.engine_name == engine_name)

    def for_pod(self, pod: str) -> "Wanted | None":
        """A pod's part, the others' pods left out of it; None while the pod has no part yet."""
        if self.assigned is not None and pod not in self.assigned:
            return None
        mine = [item.model_copy(update={"pods": None}) for item in self.adapters if item.is_for(pod)]
        return self.model_copy(update={"adapters": mine, "assigned": None})


AdapterState = Literal["Pending", "Loading", "Loaded", "Draining", "Failed"]


class ResidentAdapter(Message):
    """One adapter in one pod."""

    engine_name: str
    adapter: str
    digest: str
    state: AdapterState
    reason: str | None = None
    message: str | None = None
    load_seconds: float | None = None
    size_bytes: int | None = None


class Residency(Message):
    """What one pod has loaded; written when it changes, never on a timer."""

    pod: str
    pod_uid: str
    ready: bool  # engine healthy and every required adapter back since the engine's last start
    engine_started: str | None = None  # changes when the engine restarts
    adapters: list[ResidentAdapter] = Field(default_factory=list)


class RouteTarget(Message):
    """What answers a route."""

    engine_model: str  # the model name that the engine knows: an adapter's engine name, or the served base model's name
    adapter: str | None = None  # name of the Adapter resource; None: the bare base model
    version: str | None = None
    digest: str | None = None
    weight: int = 100


class RouteEntry(Message):
    """One model name that clients use; `steps` are those of a sequence, which has no targets."""

    model: str  # <namespace>/<route>
    targets: list[RouteTarget]
    steps: list[RouteTarget] = Field(default_factory=list)  # each one's answer is the next one's question

    @property
    def leads_to(self) -> list[RouteTarget]:
        """Everything that a request may be answered by."""
        return [*self.targets, *self.steps]


class Backend(Message):
    """One ready replica."""

    pod: str
    address: str  # ip:port of the engine
    loaded: list[str]  # engine models that it can answer, the base model's name included


class Routes(Message):
    """One deployment's part of the gateway's table."""

    schema_version: int = 1
    namespace: str
    deployment: str
    base_model: str
    unavailable: str | None = None  # why nothing can answer now, for the gateway's error
    idle_seconds: int | None = (
        None  # it sleeps when it is idle for so long, and a request wakes it; None: it never sleeps
    )
    routes: list[RouteEntry] = Field(default_factory=list)
    backends: list[Backend] = Field(default_factory=list)


class Demand(Message):
    """That a deployment which may sleep is asked for, as one gateway sees it."""

    namespace: str
    deployment: str
    at: str  # of the newest request that arrived or ran, as status.now() writes it


def demand_key(namespace: str, deployment: str, gateway: str) -> str:
    """The key of one deployment and gateway in graft-demand."""
    return f"{namespace}.{deployment}.{gateway}"


def demand_interval(idle_seconds: int) -> int:
    """Seconds within which a gateway tells of a request, and which the operator therefore waits on top of idle_seconds."""
    return min(30, max(2, idle_seconds // 4))


def engine_name(tenant: str, adapter_resource: str, manifest_digest: str) -> str:
    """The name an engine knows an adapter by: a new version is a new name, so no cache is ever stale."""
    return f"{tenant}--{adapter_resource}--{manifest_digest.removeprefix('sha256:')[:12]}"
