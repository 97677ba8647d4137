"""FineTuneJob: tune a base model on a dataset and publish the result as a new version of an adapter."""

from typing import Annotated, Any, Literal

from pydantic import Field

from graft.api.adapter import DeletionPolicy
from graft.api.meta import (
    DATASET_URI,
    DNS_LABEL,
    SEMVER,
    Conditions,
    Placement,
    Resource,
    Resources,
    Schema,
    Status,
    rules,
)


class Columns(Schema):
    """Names of the dataset's fields, where they differ from the format's own."""

    messages: str | None = Field(default=None, max_length=128, description="chat: the list of messages.")
    instruction: str | None = Field(default=None, max_length=128, description="instruction: what is asked.")
    input: str | None = Field(default=None, max_length=128, description="instruction: further input, may be empty.")
    output: str | None = Field(default=None, max_length=128, description="instruction: the answer to learn.")
    text: str | None = Field(default=None, max_length=128, description="text: the text to learn.")


class DatasetSource(Schema):
    """One JSONL file."""

    uri: str = Field(
        pattern=DATASET_URI,
        max_length=1024,
        description="s3://bucket/key, hf://datasets/org/name@revision/file, pvc://claim/path or configMap://name/key.",
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many examples.")


class Dataset(Schema):
    """What to learn from."""

    train: DatasetSource = Field(description="The examples to learn from.")
    eval: DatasetSource | None = Field(default=None, description="Held-out examples to measure with.")
    eval_split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Without eval: the share of train that is held out, drawn with training.seed."
    )
    format: Literal["chat", "instruction", "text"] = Field(
        default="chat",
        description="chat: {messages:[{role,content}]}; instruction: {instruction,input,output}; text: {text}. "
        "Of chat and instruction only the answers are learned.",
    )
    template: str | None = Field(
        default=None,
        max_length=4096,
        description="instruction: the prompt, with {instruction} and {input}. Without it the model's chat template is used.",
    )
    columns: Columns | None = Field(default=None, description="Names of the fields, where they differ.")


TargetPreset = Literal["attention", "attention+mlp", "all-linear"]


class Lora(Schema):
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / rank) B A, only A and B are trained."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank r of the update.")
    alpha: float | None = Field(default=None, gt=0, description="Scale of the update; 2 x rank when absent.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before A.")
    target_modules: TargetPreset | None = Field(
        default=None, description="Which projections carry an update; all-linear (QLoRA paper) when absent."
    )
    target_module_names: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Module names instead of a preset, for example q_proj.",
        json_schema_extra={"x-kubernetes-list-type": "set", "items": {"type": "string", "maxLength": 128}},
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "!(has(self.targetModules) && has(self.targetModuleNames))",
                "give targetModules (a preset) or targetModuleNames, not both",
            )
        )
    }


class QLora(Lora):
    """LoRA over a base model that is held in 4 bits (Dettmers et al. 2023)."""

    quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="The 4-bit data type.")
    double_quant: bool = Field(default=True, description="Quantize the quantization constants, too.")
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="Type of the matrix products; bfloat16 on GPUs that have it, else float32, when absent.",
    )


class Method(Schema):
    """How to tune: exactly one."""

    lora: Lora | None = Field(default=None, description="Low-rank adaptation.")
    qlora: QLora | None = Field(default=None, description="Low-rank adaptation over a 4-bit base model.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "(has(self.lora) ? 1 : 0) + (has(self.qlora) ? 1 : 0) == 1",
                "give exactly one method: lora or qlora",
            )
        )
    }

    @property
    def name(self) -> Literal["lora", "qlora"]:
        return "lora" if self.lora is not None else "qlora"

    @property
    def config(self) -> Lora:
        chosen = self.lora or self.qlora
        assert chosen is not None, "CEL lets exactly one through"  # noqa: S101
        return chosen


class Training(Schema):
    """Hyperparameters, with the names of Hugging Face's TrainingArguments. What is absent is derived; see status.resolved."""

    num_train_epochs: float | None = Field(default=None, gt=0, description="Passes over the data; 3 when absent.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop after so many optimizer steps; wins over epochs."
    )
    learning_rate: float | None = Field(default=None, gt=0, le=1, description="Peak learning rate; 2e-4 when absent.")
    per_device_train_batch_size: int | None = Field(
        default=None, ge=1, description="Examples per device and micro-batch; derived when absent."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches per optimizer step; derived for an effective batch of 16 when absent.",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="How the learning rate falls."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which it rises.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay (AdamW).")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="Longer examples are cut, in tokens; at most the model's context, which is the default up to 2048.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about 30 % slower."
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between records of the loss.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between evaluations of the loss; each epoch when absent."
    )
    seed: int = Field(default=42, ge=0, le=2147483647, description="Seed of data order, dropout and initialisation.")


class Evaluation(Schema):
    """What is measured on the held-out examples: loss, and exact match of generated answers, for base and adapter."""

    max_samples: int = Field(
        default=200, ge=0, description="Held-out examples to generate answers for; 0 measures the loss only."
    )
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest generated answer, in tokens.")


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


class FineTuneJobSpec(Placement):
    """One run of training; immutable, like the Job it becomes."""

    base_model: str = Field(
        min_length=1, max_length=63, description="Name of the BaseModel. The job waits until it is there and Ready."
    )
    dataset: Dataset = Field(description="What to learn from.")
    method: Method = Field(description="How to tune: exactly one of lora, qlora.")
    training: Training = Field(default_factory=Training, description="Hyperparameters.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured.")
    output: Output = Field(description="What is published.")
    resources: Resources | None = Field(
        default=None, description="Of the training container; 1 CPU and 4Gi without a GPU when absent."
    )
    retries: int = Field(
        default=2,
        ge=0,
        le=100,
        description="How often a failed pod is replaced. Errors that are yours to fix and evictions do not count.",
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=60, description="The job fails when it has run for so long."
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
    started_at: str | None = Field(default=None, description="When it started.")
    ended_at: str | None = Field(default=None, description="When it ended.")
    reason: str | None = Field(default=None, description="Why it ended: Completed or a failure's reason.")
    message: str | None = Field(default=None, description="What happened.")


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
    trainable_parameters: int | None = Field(default=None, description="Parameters that are trained.")
    total_parameters: int | None = Field(default=None, description="Parameters in all.")


class FineTuneJobStatus(Status):
    """Where the job is."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(
        default=None,
        description="A summary of the conditions: Waiting, Pending, Preparing, Training, Evaluating, Publishing, Succeeded, Failed.",
    )
    start_time: str | None = Field(default=None, description="When the first pod started.")
    completion_time: str | None = Field(default=None, description="When the job ended.")
    progress: Progress | None = Field(default=None, description="How far the training is.")
    progress_text: str | None = Field(default=None, description="Percent, for kubectl get.")
    loss_text: str | None = Field(default=None, description="Loss, for kubectl get.")
    eta_text: str | None = Field(default=None, description="Time left, for kubectl get.")
    resolved: Resolved | None = Field(default=None, description="What was derived where the spec leaves it open.")
    attempts: list[Attempt] | None = Field(
        default=None,
        description="The pods of the job, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    adapter_ref: AdapterReference | None = Field(default=None, description="The version that was published.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Scores on the held-out examples; base/… are the base model's own."
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
        ("self.spec == oldSelf.spec", "the spec of a FineTuneJob is immutable: delete it and create a new one"),
    ),
    "spec_rules": rules(
        (
            "!(has(self.dataset.eval) && has(self.dataset.evalSplit))",
            "dataset: give eval (a source) or evalSplit (a share of train), not both",
        ),
        (
            "!has(self.dataset.template) || self.dataset.format == 'instruction'",
            "dataset.template goes with format: instruction",
        ),
    ),
}
