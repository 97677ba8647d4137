"""FineTuneJob: tune a base model on a dataset and publish the result as a new version of an adapter."""

from typing import Any

from pydantic import Field

from graft.api.adapter import DeletionPolicy
from graft.api.evaluation import Evaluation
from graft.api.meta import (
    DNS_LABEL,
    SEMVER,
    VERSION_RANGE,
    Conditions,
    Placement,
    Resource,
    Resources,
    Schema,
    Status,
    rules,
)
from graft.api.recipe import Dataset, Method, Training
from graft.api.retention import Retention

# What may be changed: everything else is the run. The last three are looked at when a Job is made.
MUTABLE = ("suspend", "ttlSecondsAfterFinished", "restarts", "retries", "activeDeadlineSeconds", "resources")


class Output(Schema):
    """What is published."""

    adapter: str = Field(pattern=DNS_LABEL, max_length=40, description="Name of the adapter.")
    version: str = Field(
        default="auto",
        pattern=r"^auto$|" + SEMVER,
        max_length=32,
        description="A semantic version, or auto: the next patch for the recipe of the newest version, the next minor for another "
        "recipe, the next major for another base model; 1.0.0 for the first.",
    )
    deletion_policy: DeletionPolicy = Field(
        default="Retain", description="What deleting the published Adapter does to its files in object storage."
    )
    base_versions: str | None = Field(
        default=None,
        pattern=VERSION_RANGE,
        max_length=32,
        description="Versions of the BaseModel (its spec.version) that the adapter fits beside the very files that it is tuned on: "
        "1.4.2, 1.4, ^1 or ^1.4.",
    )
    retention: Retention | None = Field(
        default=None, description="What happens to versions of the adapter that nobody uses; copied to the Adapter."
    )


class FineTuneJobSpec(Placement):
    """One run of training; immutable, like the Job it becomes, but for what stops it, ends it and starts it again."""

    base_model: str = Field(
        min_length=1, max_length=63, description="Name of the BaseModel. The job waits until it is there and Ready."
    )
    dataset: Dataset = Field(description="What to learn from.")
    method: Method = Field(description="How to tune: exactly one of full, lora, qlora, promptTuning.")
    training: Training = Field(default_factory=Training, description="Hyperparameters.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured.")
    output: Output = Field(description="What is published.")
    resources: Resources | None = Field(
        default=None,
        description="Of the training container. When absent Graft estimates the memory and takes the smallest GPUs of this cluster "
        "that fit; see status.sizing. A change counts when the next Job is made, after restarts was raised; other GPUs in number make the run begin anew.",
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Pods that train together, each with the resources above; 1 with explicit resources, else by the estimate.",
    )
    spot: bool = Field(
        default=False,
        description="Prefer nodes that may be taken away: their taints are tolerated. The run goes on from its newest checkpoint.",
    )
    queue: str | None = Field(
        default=None,
        pattern=DNS_LABEL,
        max_length=63,
        description="Name of a Kueue LocalQueue; the job is Queued until Kueue admits it.",
    )
    suspend: bool = Field(
        default=False,
        description="Stop the pods after a checkpoint, and keep everything; false goes on from there. May be changed at any time.",
    )
    retries: int = Field(
        default=2,
        ge=0,
        le=100,
        description="How often a failed pod is replaced. Errors that are yours to fix, evictions and halved micro-batches do not count. "
        "Of a run with GPUs the Job that checks before has as many. A change counts when the next Job is made, after restarts was raised.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=60,
        description="The job fails when it has run for so long; time in suspension does not count, nor that of the checks "
        "before a run with GPUs, which may take as long. A change counts when the next Job is made, after restarts was raised.",
    )
    restarts: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Raise it to start a job again that has failed: it goes on from its newest checkpoint, with the retries, "
        "activeDeadlineSeconds and resources that it has by then.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        description="The job is deleted so long after its end; the Adapter stays. May be changed at any time.",
    )


class Progress(Status):
    """How far the training is, as the training pod last wrote it."""

    step: int = Field(default=0, description="Optimizer steps done.")
    total_steps: int = Field(default=0, description="Optimizer steps in all.")
    percent: int = Field(default=0, description="Share of the steps done, 0 to 100.")
    loss: float | None = Field(default=None, description="Mean training loss since the last record, nats per token.")
    eval_loss: float | None = Field(default=None, description="Loss on the held-out examples, nats per token.")
    tokens_per_second: float | None = Field(default=None, description="Training tokens per second.")
    eta_seconds: int | None = Field(default=None, description="Seconds until training ends, at the present speed.")


class Attempt(Status):
    """One pod that ran, or runs, for the job."""

    pod: str = Field(description="The pod's name.")
    index: int | None = Field(default=None, description="Which of the job's nodes it was; absent with one node.")
    started_at: str | None = Field(default=None, description="When it started.")
    ended_at: str | None = Field(default=None, description="When it ended.")
    resumed_from: int | None = Field(default=None, description="Step of the checkpoint that it went on from.")
    micro_batch: int | None = Field(default=None, description="Examples per device and micro-batch that it used.")
    accumulation: int | None = Field(default=None, description="Micro-batches per optimizer step that it used.")
    reason: str | None = Field(default=None, description="Why it ended: Completed or a failure's reason.")
    message: str | None = Field(default=None, description="What happened.")


class Checkpoint(Status):
    """A state of the training in object storage that a new attempt can go on from."""

    step: int = Field(description="Optimizer steps done.")
    attempt: str = Field(description="The pod that wrote it.")
    size_bytes: int = Field(description="Size of its files.")
    created_at: str = Field(description="When it was complete.")


class DatasetFacts(Status):
    """What prepare found in the data."""

    examples: int = Field(default=0, description="Examples that are learned from.")
    held_out: int = Field(default=0, description="Examples that are measured with.")
    invalid: int = Field(default=0, description="Lines that were left out (onInvalid: skip).")
    tokens: int = Field(default=0, description="Tokens in all, after truncation.")
    mean_tokens: float = Field(default=0, description="Tokens of an example, on average, before truncation.")
    median_tokens: int = Field(default=0, description="Half of the examples have at most so many tokens.")
    p95_tokens: int = Field(default=0, description="19 of 20 examples have at most so many tokens.")
    max_tokens: int = Field(default=0, description="Tokens of the longest example, before truncation.")
    truncated_share: float = Field(default=0, description="Share of the examples that are cut to maxLength, 0 to 1.")
    sampled: bool = Field(default=False, description="Whether the lengths are those of a sample of the examples.")


class Sizing(Status):
    """The memory that the job needs per GPU (or in all, without one), itemised, and what was chosen for it."""

    items: dict[str, int] = Field(default_factory=dict, description="Bytes by what needs them.")
    total_bytes: int = Field(default=0, description="Sum of the items.")
    gpu: str | None = Field(default=None, description="Product name of the GPU; absent on CPUs.")
    gpu_memory_bytes: int | None = Field(default=None, description="Memory of one such GPU.")
    gpus_per_node: int = Field(default=0, description="GPUs of each pod.")
    nodes: int = Field(default=1, description="Pods.")
    micro_batch: int | None = Field(default=None, description="Examples per device that the estimate is for.")
    gradient_checkpointing: bool | None = Field(default=None, description="Whether activations are recomputed.")
    sharding: str | None = Field(default=None, description="ddp or fsdp, with more than one GPU.")
    node_memory_bytes: int | None = Field(default=None, description="Memory of each pod outside of the GPUs.")
    node_disk_bytes: int | None = Field(
        default=None, description="Disk of each pod: the base model, a checkpoint, what is published."
    )
    source: str = Field(default="estimate", description="estimate, or spec when resources are explicit.")
    message: str | None = Field(default=None, description="The choice in words.")


class AdapterReference(Status):
    """The version that the job published."""

    name: str = Field(description="Name of the Adapter resource.")
    adapter: str = Field(description="The adapter.")
    version: str = Field(description="The version.")


class Resolved(Status):
    """What was derived where the spec leaves it open."""

    version: str | None = Field(default=None, description="The version that is to be published.")
    base_model_digest: str | None = Field(
        default=None, description="Digest or revision of the base model that is used."
    )
    base_model_uri: str | None = Field(default=None, description="Where the base model is read from.")
    recipe: str | None = Field(
        default=None, description="Digest of method and hyperparameters; decides between patch and minor."
    )
    training: dict[str, Any] | None = Field(
        default=None,
        description="The hyperparameters in force.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    target_modules: list[str] | None = Field(default=None, description="Modules that carry the low-rank update.")
    world_size: int | None = Field(default=None, description="Processes that train together.")
    trainable_parameters: int | None = Field(default=None, description="Parameters that are trained.")
    total_parameters: int | None = Field(default=None, description="Parameters in all.")


class FineTuneJobStatus(Status):
    """Where the job is."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(
        default=None,
        description="A summary of the conditions: Waiting, Queued, Suspended, Pending, Preparing, Training, Evaluating, Publishing, "
        "Succeeded, Failed, Rejected.",
    )
    start_time: str | None = Field(default=None, description="When the first pod started.")
    completion_time: str | None = Field(default=None, description="When the job ended.")
    progress: Progress | None = Field(default=None, description="How far the training is.")
    progress_text: str | None = Field(default=None, description="Percent, for kubectl get.")
    loss_text: str | None = Field(default=None, description="Loss, for kubectl get.")
    eta_text: str | None = Field(default=None, description="Time left, for kubectl get.")
    resolved: Resolved | None = Field(default=None, description="What was derived where the spec leaves it open.")
    sizing: Sizing | None = Field(default=None, description="The memory estimate and what was chosen for it.")
    dataset: DatasetFacts | None = Field(default=None, description="What prepare found in the data.")
    checkpoints: list[Checkpoint] | None = Field(
        default=None,
        description="Complete checkpoints, oldest first; empty once the version is published.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    attempts: list[Attempt] | None = Field(
        default=None,
        description="The pods of the job, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    checked: bool | None = Field(
        default=None,
        description="Whether all that can be checked without a GPU was found right, before a run that takes GPUs.",
    )
    restarts: int | None = Field(default=None, description="The spec's restarts that were last acted on.")
    adapter_ref: AdapterReference | None = Field(default=None, description="The version that was published.")
    metrics: dict[str, float] | None = Field(
        default=None,
        description="Scores on the held-out examples and the suites (<suite>/…); base/…, fewShot/… and current/… are the baselines'.",
    )
    conditions: Conditions


class FineTuneJob(Resource):
    """Tune a base model on a dataset and publish the result as a new version of an adapter."""

    spec: FineTuneJobSpec
    status: FineTuneJobStatus = Field(default_factory=lambda: FineTuneJobStatus(conditions=[]))


CRD: dict[str, Any] = {
    "kind": "FineTuneJob",
    "plural": "finetunejobs",
    "shortNames": ["ftj"],
    "scope": "Namespaced",
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Method", "string", ".metadata.labels.graft\\.dev/method", 0),
        ("Model", "string", ".spec.baseModel", 0),
        ("Progress", "string", ".status.progressText", 0),
        ("Loss", "string", ".status.lossText", 0),
        ("ETA", "string", ".status.etaText", 0),
        ("Adapter", "string", ".status.adapterRef.name", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Message", "string", ".status.conditions[?(@.type=='Succeeded')].message", 1),
    ],
    "rules": rules(
        (
            "self.metadata.name.size() <= 50",
            "metadata.name must be at most 50 characters: the Job and its pods carry it in their names",
        ),
    ),
    "mutable": MUTABLE,
    "spec_rules": rules(
        (
            "!(has(self.dataset.eval) && has(self.dataset.evalSplit))",
            "dataset: give eval (a source) or evalSplit (a share of train), not both",
        ),
        (
            "!has(self.dataset.templates) || self.dataset.format == 'instruction'",
            "dataset.templates goes with format: instruction",
        ),
        (
            "!(has(self.queue) && has(self.suspend) && self.suspend)",
            "a queued job is Kueue's to suspend: set spec.active of its Workload to false",
        ),
        (
            "!has(self.training) || !has(self.training.sharding) || self.training.sharding != 'fsdp' || !has(self.method.qlora)",
            "training.sharding: fsdp does not go with qlora: 4-bit weights are not sharded; use ddp, or lora",
        ),
        (
            "!has(self.training) || !has(self.training.sharding) || self.training.sharding != 'fsdp' || "
            "!has(self.training.optim) || self.training.optim == 'adamw'",
            "training.sharding: fsdp does not go with adamw8bit and adafactor: they do not know sharded weights; use adamw, or ddp",
        ),
        (
            "!has(self.nodes) || self.nodes == 1 || has(self.resources)",
            "nodes needs resources: say what each of the pods gets, or leave both out",
        ),
    ),
}
