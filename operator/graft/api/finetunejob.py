"""FineTuneJob: tune a base model on a dataset and publish the result as a new version of an adapter."""

from typing import Any

from pydantic import Field

from graft.api.adapter import DeletionPolicy
from graft.api.evaluation import Evaluation
from graft.api.meta import Conditions, Placement, Resource, Resources, Schema, Status, rules
from graft.api.patterns import DNS_LABEL, DNS_NAME, NEW_VERSION, SEMVER, VERSION_RANGE
from graft.api.podtemplate import PodTemplate
from graft.api.recipe import Dataset, Method, Training
from graft.api.retention import Retention

# Fields that may be changed. All others define the run. The last four take effect when the next Job is created.
MUTABLE = (
    "suspend",
    "ttlSecondsAfterFinished",
    "restarts",
    "retries",
    "activeDeadlineSeconds",
    "resources",
    "podTemplate",
)
LONGEST = 2147483647  # seconds; Kubernetes counts in nanoseconds, and a much longer time would end at once


class Output(Schema):
    """What the job publishes."""

    adapter: str = Field(pattern=DNS_LABEL, max_length=40, description="Name of the adapter.")
    version: str = Field(
        default="auto",
        pattern=NEW_VERSION,
        max_length=32,
        description="A semantic version, or auto. auto chooses the version after the newest one of the adapter: the next patch "
        "for the same recipe, the next minor for another recipe, the next major for another base model. The first "
        "version is 1.0.0.",
    )
    deletion_policy: DeletionPolicy = Field(
        default="Retain",
        description="What happens to the files in object storage when the published Adapter is deleted. Retain keeps them, "
        "Delete deletes them.",
    )
    base_versions: str | None = Field(
        default=None,
        pattern=VERSION_RANGE,
        max_length=32,
        description="Range of versions of the BaseModel (its spec.version) that the adapter also fits: 1.4.2, 1.4, ^1 or ^1.4. "
        "When absent, the adapter fits only the files that it was tuned on.",
    )
    retention: Retention | None = Field(
        default=None,
        description="What happens to unused versions of the adapter. Copied to the Adapter. The policy of the newest Ready "
        "version applies to all versions.",
    )


class FineTuneJobSpec(Placement):
    """One training run. The spec is immutable, except for suspend, ttlSecondsAfterFinished, restarts, retries,
    activeDeadlineSeconds, resources and podTemplate."""

    base_model: str = Field(
        pattern=DNS_NAME,
        max_length=63,
        description="Name of the BaseModel. The job waits until it exists and is Ready.",
    )
    dataset: Dataset = Field(description="The training data, and the held-out data for the evaluation.")
    method: Method = Field(description="How to tune the model: exactly one of full, lora, qlora, promptTuning.")
    training: Training = Field(
        default_factory=Training,
        description="Hyperparameters. Graft derives absent values and shows all values in status.resolved.training.",
    )
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured after training.")
    output: Output = Field(description="What the job publishes.")
    resources: Resources | None = Field(
        default=None,
        description="Resources of the training container. When absent, Graft estimates the memory and chooses the smallest GPUs "
        "of the cluster that fit (see status.sizing). A change takes effect when the next Job is created, after "
        "restarts was raised. With another number of GPUs, the run starts again from the first step.",
    )
    pod_template: PodTemplate | None = Field(
        default=None,
        description="What is added to the pods of the job: labels, annotations, affinity, spread, variables, volumes. A change "
        "takes effect when the next Job is created, after restarts was raised.",
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Number of pods that train together, each with spec.resources. When absent: 1 with explicit resources, "
        "otherwise chosen by the estimate.",
    )
    spot: bool = Field(
        default=False,
        description="Prefer spot nodes, which may be removed at any time, and tolerate their taints. After an interruption, the "
        "run resumes from its newest checkpoint.",
    )
    queue: str | None = Field(
        default=None,
        pattern=DNS_LABEL,
        max_length=63,
        description="Name of a Kueue LocalQueue in this namespace. The job is Queued until Kueue admits it.",
    )
    suspend: bool = Field(
        default=False,
        description="true: write a checkpoint and stop the pods, but keep all data. false: start, or resume from the newest "
        "checkpoint. May be changed at any time.",
    )
    retries: int = Field(
        default=2,
        ge=0,
        le=100,
        description="How many times a failed pod is replaced. With several pods, each one has this many retries. An error that "
        "you have to fix ends the job at once. Evictions, and attempts that halve the micro-batch, do not count. The "
        "preflight Job, which runs first if the job needs GPUs, has the same number of retries of its own. A change "
        "takes effect when the next Job is created, after restarts was raised.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=60,
        le=LONGEST,
        description="The job fails if it runs for longer than this many seconds. No limit when absent. Time in suspension does "
        "not count. The preflight Job, which runs first if the job needs GPUs, does not count either, and has the "
        "same limit of its own. A change takes effect when the next Job is created, after restarts was raised.",
    )
    restarts: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Raise this number to restart a failed job. The job resumes from its newest checkpoint, with the current "
        "retries, activeDeadlineSeconds, resources and podTemplate. A Rejected job cannot be restarted.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=LONGEST,
        description="The job is deleted this many seconds after it ended. The Adapter stays. Never deleted when absent, or when "
        "Argo CD or Flux applies the job: they would create it again, and it would train again. May be changed at any time.",
    )


class Progress(Status):
    """How far the training is, as last reported by the training pod."""

    step: int = Field(default=0, description="Optimizer steps done.")
    total_steps: int = Field(default=0, description="Optimizer steps of the whole run.")
    percent: int = Field(default=0, description="Share of the steps done, 0 to 100.")
    loss: float | None = Field(
        default=None, description="Mean training loss since the previous record, in nats per token."
    )
    eval_loss: float | None = Field(default=None, description="Loss on the held-out examples, in nats per token.")
    tokens_per_second: float | None = Field(default=None, description="Training tokens per second.")
    eta_seconds: int | None = Field(
        default=None,
        description="Estimated seconds until the stage ends. Training includes the held-out losses that it measures.",
    )


class Attempt(Status):
    """One pod of the job, running or ended."""

    pod: str = Field(description="Name of the pod.")
    index: int | None = Field(default=None, description="Index of the pod among the job's nodes. Absent with one node.")
    started_at: str | None = Field(default=None, description="When the pod started.")
    ended_at: str | None = Field(default=None, description="When the pod ended.")
    resumed_from: int | None = Field(default=None, description="Step of the checkpoint that the attempt resumed from.")
    micro_batch: int | None = Field(default=None, description="Examples per device in one micro-batch.")
    accumulation: int | None = Field(default=None, description="Micro-batches per optimizer step.")
    reason: str | None = Field(default=None, description="Why the pod ended: Completed, or the reason of a failure.")
    message: str | None = Field(default=None, description="What happened.")


class Checkpoint(Status):
    """A checkpoint in object storage that a new attempt can resume from."""

    step: int = Field(description="Optimizer steps done.")
    attempt: str = Field(description="Name of the pod that wrote the checkpoint.")
    size_bytes: int = Field(description="Size of the checkpoint's files in bytes.")
    created_at: str = Field(description="When the checkpoint was complete.")


class DatasetFacts(Status):
    """What the container prepare found in the data."""

    examples: int = Field(default=0, description="Number of training examples.")
    held_out: int = Field(default=0, description="Number of held-out examples.")
    invalid: int = Field(default=0, description="Number of lines that were left out (onInvalid: skip).")
    invalid_reasons: dict[str, int] = Field(
        default_factory=dict,
        description="Number of lines that were left out, by reason: format, templateRefuses, notRendered, noEnd, "
        "controlTokens, nothingToLearn, tooLong.",
    )
    unread_fields: dict[str, int] = Field(
        default_factory=dict,
        description="Number of lines with a field that neither Graft nor the chat template reads, by field. At most 16 fields.",
    )
    repeated: int = Field(default=0, description="Number of held-out examples that are also in the training data.")
    tokens: int = Field(default=0, description="Total tokens of the training examples, after truncation.")
    mean_tokens: float = Field(default=0, description="Mean tokens per training example, before truncation.")
    median_tokens: int = Field(default=0, description="Median tokens per training example, before truncation.")
    p95_tokens: int = Field(
        default=0, description="95 % of the training examples have at most this many tokens, before truncation."
    )
    max_tokens: int = Field(default=0, description="Tokens of the longest training example, before truncation.")
    truncated_share: float = Field(
        default=0, description="Share of the training examples that are cut to maxLength, 0 to 1."
    )
    sampled: bool = Field(
        default=False, description="Whether the token counts were measured on a sample of the examples."
    )


class Sizing(Status):
    """Estimated memory per GPU (in total without GPUs), itemised, and the resources that were chosen for it."""

    items: dict[str, int] = Field(
        default_factory=dict, description="Bytes of each item in the estimate, for example weights."
    )
    total_bytes: int = Field(default=0, description="Sum of the items in bytes.")
    gpu: str | None = Field(default=None, description="Product name of the GPU. Absent on CPUs.")
    gpu_memory_bytes: int | None = Field(default=None, description="Memory of one GPU in bytes.")
    gpus_per_node: int = Field(default=0, description="Number of GPUs of each pod.")
    nodes: int = Field(default=1, description="Number of pods.")
    micro_batch: int | None = Field(default=None, description="Examples per device that the estimate assumes.")
    gradient_checkpointing: bool | None = Field(default=None, description="Whether activations are recomputed.")
    sharding: str | None = Field(default=None, description="ddp or fsdp, if there is more than one GPU.")
    node_memory_bytes: int | None = Field(default=None, description="Memory of each pod besides its GPUs, in bytes.")
    node_disk_bytes: int | None = Field(
        default=None, description="Disk space of each pod in bytes: base model, one checkpoint, and published files."
    )
    source: str = Field(
        default="estimate",
        description="estimate, spec if spec.resources is set, or default if facts of the base model are missing.",
    )
    message: str | None = Field(default=None, description="The choice in words.")


class AdapterReference(Status):
    """The version that the job published."""

    name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the Adapter resource.")
    adapter: str = Field(pattern=DNS_LABEL, max_length=40, description="Name of the adapter.")
    version: str = Field(pattern=SEMVER, max_length=32, description="Version of the adapter.")


class Resolved(Status):
    """Values that Graft derived where the spec leaves them open."""

    version: str | None = Field(
        default=None, pattern=SEMVER, max_length=32, description="Version that the job publishes."
    )
    base_model_digest: str | None = Field(
        default=None, description="Digest or revision of the base model that the job uses."
    )
    base_model_uri: str | None = Field(default=None, description="Where the base model is read from.")
    recipe: str | None = Field(
        default=None,
        description="Digest of the method, the hyperparameters, and the format and templates of the dataset. It decides between "
        "a patch and a minor version.",
    )
    training: dict[str, Any] | None = Field(
        default=None,
        description="Hyperparameters that the run uses.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    target_modules: list[str] | None = Field(default=None, description="Modules that have a low-rank update.")
    world_size: int | None = Field(default=None, description="Number of processes that train together.")
    trainable_parameters: int | None = Field(default=None, description="Number of parameters that are trained.")
    total_parameters: int | None = Field(default=None, description="Number of all parameters.")


class FineTuneJobStatus(Status):
    """State of the job."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(
        default=None,
        description="Summary of the conditions: Waiting, Queued, Suspended, Pending, Preparing, Training, Evaluating, "
        "Publishing, Succeeded, Failed or Rejected.",
    )
    start_time: str | None = Field(default=None, description="When the first pod started.")
    completion_time: str | None = Field(default=None, description="When the job ended.")
    progress: Progress | None = Field(default=None, description="How far the training is.")
    progress_text: str | None = Field(default=None, description="Percent done, for kubectl get.")
    loss_text: str | None = Field(default=None, description="Training loss, for kubectl get.")
    eta_text: str | None = Field(default=None, description="Estimated time left, for kubectl get.")
    resolved: Resolved | None = Field(
        default=None, description="Values that Graft derived where the spec leaves them open."
    )
    sizing: Sizing | None = Field(
        default=None, description="Memory estimate, and the resources that were chosen for it."
    )
    dataset: DatasetFacts | None = Field(default=None, description="What the container prepare found in the data.")
    checkpoints: list[Checkpoint] | None = Field(
        default=None,
        description="Complete checkpoints, oldest first. Empty once the version is published.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    attempts: list[Attempt] | None = Field(
        default=None,
        description="Pods of the job, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    checked: bool | None = Field(
        default=None,
        description="Whether the checks that need no GPU have passed. Set for jobs that need GPUs.",
    )
    restarts: int | None = Field(default=None, description="Value of spec.restarts that the operator last acted on.")
    adapter_ref: AdapterReference | None = Field(default=None, description="The version that the job published.")
    metrics: dict[str, float] | None = Field(
        default=None,
        description="Scores on the held-out examples and the suites (<suite>/…). Names that start with base/, fewShot/ or "
        "current/ are the scores of the baselines.",
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
            "metadata.name must be at most 50 characters, because the names of the Job and its pods contain it",
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
            "dataset.templates needs dataset.format: instruction",
        ),
        (
            "!(has(self.queue) && has(self.suspend) && self.suspend)",
            "suspend must not be true if queue is set: to suspend a queued job, set spec.active of its Workload to false",
        ),
        (
            "!has(self.training) || !has(self.training.sharding) || self.training.sharding != 'fsdp' || !has(self.method.qlora)",
            "training.sharding: fsdp cannot be used with qlora, because 4-bit weights are not sharded: use ddp, or method lora",
        ),
        (
            "!has(self.training) || !has(self.training.sharding) || self.training.sharding != 'fsdp' || "
            "!has(self.training.optim) || self.training.optim == 'adamw'",
            "training.sharding: fsdp cannot be used with adamw8bit or adafactor, because they do not support sharded weights: use adamw, or ddp",
        ),
        (
            "!has(self.nodes) || self.nodes == 1 || has(self.resources)",
            "nodes above 1 needs resources: set the resources of each pod, or leave out both fields",
        ),
    ),
}
