"""Operator to training pod: what the pod trains, composes or imports. ConfigMap key job.json, mounted at JOB_FILE."""

from typing import Literal

from pydantic import Field

from graft.api.composition import CompositionMethod
from graft.api.evaluation import Evaluation
from graft.api.recipe import Dataset, Method, MethodName, Training
from graft.contracts.message import BaseModelRef, Message

RENDEZVOUS_PORT = 29500  # of the first pod of a run with several


class JobIdentity(Message):
    """Whose run this is."""

    name: str
    namespace: str
    uid: str


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
