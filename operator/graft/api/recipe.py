"""The recipe of a FineTuneJob: the data, the method and the hyperparameters, as the training pod gets them, too."""

from typing import Annotated, Literal

from pydantic import Field

from graft.api.meta import DATASET_URI, Schema, rules


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
    templates: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="instruction: prompts with {instruction} and {input}. Several make the model robust to wording: each training "
        "example gets one, drawn with training.seed; held-out examples get the first. Without any the model's chat template is used.",
        json_schema_extra={"x-kubernetes-list-type": "atomic", "items": {"type": "string", "maxLength": 4096}},
    )
    columns: Columns | None = Field(default=None, description="Names of the fields, where they differ.")
    on_invalid: Literal["fail", "skip"] = Field(
        default="fail",
        description="What an invalid line does: fail refuses the file and names its lines; skip leaves it out and counts it in "
        "status.dataset.",
    )


TargetPreset = Literal["attention", "attention+mlp", "all-linear", "all-linear+embeddings"]


class Full(Schema):
    """All weights are trained, and the version is a whole model."""


class Lora(Schema):
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / rank) B A, only A and B are trained."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank r of the update.")
    alpha: float | None = Field(default=None, gt=0, description="Scale of the update; 2 x rank when absent.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before A.")
    bias: Literal["none", "all", "loraOnly"] = Field(
        default="none",
        description="Which biases of the base model are trained, too. vLLM serves only none.",
    )
    target_modules: TargetPreset | None = Field(
        default=None,
        description="Which projections carry an update; all-linear (QLoRA paper) when absent. +embeddings trains an update of the "
        "token embeddings, too.",
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


class PromptTuning(Schema):
    """Soft prompts (Lester et al. 2021): vectors before the input are trained, the model is not."""

    virtual_tokens: int = Field(default=20, ge=1, le=512, description="Number of trained vectors.")
    init_text: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="The vectors start as the embeddings of this text, repeated or cut; at random when absent.",
    )


MethodName = Literal["full", "lora", "qlora", "promptTuning"]


class Method(Schema):
    """How to tune: exactly one."""

    full: Full | None = Field(default=None, description="All weights.")
    lora: Lora | None = Field(default=None, description="Low-rank adaptation.")
    qlora: QLora | None = Field(default=None, description="Low-rank adaptation over a 4-bit base model.")
    prompt_tuning: PromptTuning | None = Field(default=None, description="Trained vectors before the input.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "(has(self.full) ? 1 : 0) + (has(self.lora) ? 1 : 0) + (has(self.qlora) ? 1 : 0) + "
                "(has(self.promptTuning) ? 1 : 0) == 1",
                "give exactly one method: full, lora, qlora or promptTuning",
            )
        )
    }

    @property
    def name(self) -> MethodName:
        if self.full is not None:
            return "full"
        if self.lora is not None:
            return "lora"
        return "qlora" if self.qlora is not None else "promptTuning"

    @property
    def low_rank(self) -> Lora | None:
        """The low-rank update's settings, for lora and qlora."""
        return self.lora or self.qlora


SHARDABLE = ("adamw",)  # optimizers that know weights of which each process has a part


class Training(Schema):
    """Hyperparameters, with the names of Hugging Face's TrainingArguments. What is absent is derived; see status.resolved."""

    num_train_epochs: float | None = Field(default=None, gt=0, description="Passes over the data; 3 when absent.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop after so many optimizer steps; wins over epochs."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate; when absent 2e-4 for lora and qlora, 2e-5 for full, 3e-2 for promptTuning.",
    )
    per_device_train_batch_size: int | None = Field(
        default=None, ge=1, description="Examples per device and micro-batch; derived from the memory when absent."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches per optimizer step; derived for an effective batch of 16 when absent.",
    )
    optim: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        default="adamw",
        description="The optimizer. adamw8bit (bitsandbytes, GPUs only) and adafactor keep less state per trained parameter, and do not "
        "go with fsdp.",
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = Field(default="cosine", description="How the learning rate falls.")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which it rises.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps in which it rises; wins over warmupRatio.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay (AdamW).")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Keeps the division finite.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="Longer examples are cut, in tokens; at most the model's context, which is the default up to 2048.",
    )
    packing: bool = Field(
        default=False,
        description="Put several short examples into one sequence of maxLength, each attending to itself only: no work is spent on "
        "padding. causal models only.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs."
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations: less memory, about 30 % slower. When absent, only where it would not fit otherwise.",
    )
    use_liger_kernel: bool | None = Field(
        default=None,
        description="Liger's fused kernels for norms, rotary positions, MLP and loss: faster, and the logits of a whole batch are "
        "never held. When absent, on GPUs wherever Liger knows the model's architecture and nothing is sharded.",
    )
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="With more than one GPU: ddp keeps the whole model on each, fsdp spreads it over all. auto: fsdp for full, and "
        "where the model fits only so, if the optimizer is adamw; else ddp.",
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between records of the loss.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between evaluations of the loss; each epoch when absent."
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints; when absent one every 5 minutes of training. At most so much work is lost when a "
        "node is taken away without a warning.",
    )
    save_total_limit: int = Field(
        default=2,
        ge=1,
        le=100,
        description="Checkpoints that are kept; older ones are removed, and all of them once the version is published.",
    )
    seed: int = Field(default=42, ge=0, le=2147483647, description="Seed of data order, dropout and initialisation.")
