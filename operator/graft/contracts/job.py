"""Operator to training pod: what the pod trains, composes or imports. ConfigMap key job.json, mounted at JOB_FILE."""

from typing import ClassVar, Literal

from pydantic import Field

from graft.api.composition import CompositionMethod
from graft.api.evaluation import Evaluation
from graft.api.recipe import Dataset, Method, MethodName, Training
from graft.bounded import Limits
from graft.contracts.message import CONFIGMAP, BaseModelRef, Message

LIMITS = Limits(CONFIGMAP, depth=12, values=20_000)  # the spec of a job has up to 32 suites, gates and templates
RENDEZVOUS_PORT = 29500  # on the first pod of a run; the ranks connect to it


class JobIdentity(Message):
    """The resource that a run belongs to."""

    name: str
    namespace: str
    uid: str
    created_at: str | None = None  # RFC 3339


class OutputRef(Message):
    """The version that the pod publishes."""

    adapter: str
    version: str


class CurrentVersion(Message):
    """The adapter's newest version. Some gates compare with it."""

    version: str
    uri: str
    digest: str  # of manifest.json


class Pods(Message):
    """The pods of one run. If the run has more than one process, all of them connect to the first pod."""

    nodes: int = 1
    processes_per_node: int = 1  # one per GPU; without GPUs, 1
    first_host: str | None = None  # DNS name of the first pod; None with one node


class Choice(Message):
    """Values that placement chose because the spec does not set them. None: the trainer derives it from the device."""

    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    sharding: Literal["ddp", "fsdp"] | None = None


class JobFile(Message):
    """The input of a training pod: the spec as the user wrote it, with the references resolved."""

    limits: ClassVar[Limits] = LIMITS

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
    preflight: bool = False  # a pod without GPUs reads every line of the dataset before the run's pods start
    halvings: int = 0  # how often to halve the micro-batch: the number of attempts that ran out of memory
    current: CurrentVersion | None = None
    hf_endpoint: str | None = None
    trainer_image: str = ""


class ParentVersion(Message):
    """One of the versions that a composition combines."""

    name: str  # of the Adapter resource
    version: str
    uri: str
    digest: str  # of manifest.json
    weight: float


class Composition(Message):
    """How to combine several versions into one."""

    parents: list[ParentVersion]
    method: CompositionMethod
    density: float | None = None
    svd_rank: int | None = None
    majority_sign: Literal["total", "frequency"] = "total"
    seed: int = 0
    into: Literal["adapter", "base"] = "adapter"


class VersionFile(Message):
    """The input of a pod that composes or imports a version, without training."""

    limits: ClassVar[Limits] = LIMITS

    schema_version: int = 1
    job: JobIdentity  # the Adapter
    tenant: str
    base_model: BaseModelRef
    output: OutputRef
    method: MethodName
    task: Literal["causal", "seq2seq"] = "causal"
    composition: Composition | None = None
    source: str | None = None  # where to import from: hf://… or s3://…/
    unmeasured: str | None = None  # why the pod does not measure the adapter's effect; None: it measures it
    hf_endpoint: str | None = None
    trainer_image: str = ""
