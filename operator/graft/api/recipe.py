"""The recipe of a FineTuneJob: data, method and hyperparameters. The training pod reads it with the same models."""

from typing import Annotated, Literal

from pydantic import Field

from graft.api.meta import Schema, rules
from graft.api.patterns import DATASET_URI, KEY_NAME, MODULE_NAME


class Columns(Schema):
    """Names of the dataset's fields, if they differ from the names that the format expects."""

    messages: str | None = Field(
        default=None,
        pattern=KEY_NAME,
        max_length=128,
        description="For format chat: field with the list of messages. Named messages when absent.",
    )
    instruction: str | None = Field(
        default=None,
        pattern=KEY_NAME,
        max_length=128,
        description="For format instruction: field with the question or task. Named instruction when absent.",
    )
    input: str | None = Field(
        default=None,
        pattern=KEY_NAME,
        max_length=128,
        description="For format instruction: field with further input, which may be empty. Named input when absent.",
    )
    output: str | None = Field(
        default=None,
        pattern=KEY_NAME,
        max_length=128,
        description="For format instruction: field with the answer to train on. Named output when absent.",
    )
    text: str | None = Field(
        default=None,
        pattern=KEY_NAME,
        max_length=128,
        description="For format text: field with the text to train on. Named text when absent.",
    )


class DatasetSource(Schema):
    """One JSONL file."""

    uri: str = Field(
        pattern=DATASET_URI,
        max_length=1024,
        description="Where the file is: s3://bucket/key, hf://datasets/org/name@revision/file, pvc://claim/path or "
        "configMap://name/key.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Use only this many examples from the start of the file. All examples when absent.",
    )


class Dataset(Schema):
    """The training data, and the held-out data for the evaluation."""

    train: DatasetSource = Field(description="The examples to train on.")
    eval: DatasetSource | None = Field(
        default=None, description="Held-out examples for the evaluation, in a file of their own."
    )
    eval_split: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of train that is held out for the evaluation, drawn with training.seed. Use it instead of eval. If "
        "eval and evalSplit are both absent, nothing is held out.",
    )
    format: Literal["chat", "instruction", "text"] = Field(
        default="chat",
        description="Fields of a line. chat: {messages:[{role,content}]}. instruction: {instruction,input,output}. text: {text}, "
        "for causal models only. For chat and instruction, the loss covers only the answers.",
    )
    templates: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="For format instruction: prompts with the placeholders {instruction} and {input}. Several templates make the "
        "model robust to different wordings. Each training example gets one template, drawn with training.seed. "
        "Held-out examples get the first one. When absent, the model's chat template builds the prompt.",
        json_schema_extra={"x-kubernetes-list-type": "atomic", "items": {"type": "string", "maxLength": 4096}},
    )
    columns: Columns | None = Field(
        default=None, description="Names of the fields, if they differ from the names in format."
    )
    on_invalid: Literal["fail", "skip"] = Field(
        default="fail",
        description="What happens if a line is invalid. fail: the job fails, and the message names the invalid lines. skip: the "
        "line is left out and counted in status.dataset.invalid.",
    )


TargetPreset = Literal["attention", "attention+mlp", "all-linear", "all-linear+embeddings"]


class Full(Schema):
    """Full fine-tuning: all weights are trained, and the version is a whole model."""


class Lora(Schema):
    """Low-rank adaptation (Hu et al. 2021): the weights become W + (alpha / rank) B A. Only A and B are trained."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank r of the low-rank update.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Scale of the update, which is multiplied by alpha / rank. 2 x rank when absent.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout probability on the input of A during training."
    )
    bias: Literal["none", "all", "loraOnly"] = Field(
        default="none",
        description="Which biases of the base model are trained too. none: no bias. all: every bias. loraOnly: the biases of the "
        "target modules. vLLM serves only none.",
    )
    target_modules: TargetPreset | None = Field(
        default=None,
        description="Which layers get a low-rank update. all-linear when absent, as in the QLoRA paper. +embeddings also trains "
        "an update of the token embeddings.",
    )
    target_module_names: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Names of the modules that get an update, for example q_proj. Use it instead of the preset in targetModules.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": MODULE_NAME, "maxLength": 128},
        },
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
    """LoRA on a base model that is held in 4 bits (Dettmers et al. 2023)."""

    quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit data type of the base model's weights.")
    double_quant: bool = Field(
        default=True, description="Also quantize the quantization constants, which saves memory."
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="Data type of the matrix products. When absent, it follows training.precision: bfloat16 for bf16, float16 "
        "for fp16, float32 for fp32.",
    )


class PromptTuning(Schema):
    """Soft prompts (Lester et al. 2021): trained vectors before the input. The weights of the model are not trained."""

    virtual_tokens: int = Field(
        default=20,
        ge=1,
        le=512,
        description="Number of trained vectors. Each one takes the place of a token in the model's context.",
    )
    init_text: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="The vectors start as the token embeddings of this text, which is repeated or cut to virtualTokens. When "
        "absent, they start as the embeddings of random tokens.",
    )


MethodName = Literal["full", "lora", "qlora", "promptTuning"]


class Method(Schema):
    """How to tune the model: exactly one method."""

    full: Full | None = Field(default=None, description="Train all weights. The version is a whole model.")
    lora: Lora | None = Field(default=None, description="Low-rank adaptation: train a low-rank update of some layers.")
    qlora: QLora | None = Field(default=None, description="Low-rank adaptation on a base model that is held in 4 bits.")
    prompt_tuning: PromptTuning | None = Field(default=None, description="Train vectors before the input.")

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
        """Return the settings of the low-rank update for lora and qlora, None for other methods."""
        return self.lora or self.qlora


SHARDABLE = ("adamw",)  # optimizers that support sharded weights, of which each process holds a part


class Training(Schema):
    """Hyperparameters, with the names of Hugging Face's TrainingArguments.

    Graft derives absent values and shows all values in status.resolved.training.
    """

    num_train_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Number of passes over the training data. 3 when absent. Ignored if maxSteps is set.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Number of optimizer steps. If set, it replaces numTrainEpochs."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate. When absent: 2e-4 for lora and qlora, 2e-5 for full, 3e-2 for promptTuning.",
    )
    per_device_train_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Examples per device in one micro-batch. When absent, Graft derives it from the available memory.",
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches per optimizer step. When absent, Graft derives it for an effective batch of 16 examples: "
        "perDeviceTrainBatchSize x gradientAccumulationSteps x processes.",
    )
    optim: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        default="adamw",
        description="The optimizer. adamw8bit (bitsandbytes) and adafactor keep less state per trained parameter, but do not "
        "support fsdp. adamw8bit needs a GPU.",
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = Field(default="cosine", description="How the learning rate changes after the warmup. constant has no warmup.")
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the optimizer steps in which the learning rate rises to its peak. Ignored if warmupSteps is set.",
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="Number of optimizer steps in which the learning rate rises to its peak. If set, it replaces warmupRatio.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay, as in AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay rate of the first moment.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay rate of the second moment.")
    adam_epsilon: float = Field(
        default=1e-8, gt=0, description="AdamW: small term in the denominator that prevents a division by zero."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="Longest example in tokens. Longer examples are cut. It must not exceed the model's context length (for "
        "promptTuning, the context length minus virtualTokens). When absent: that limit, but at most 2048.",
    )
    packing: bool = Field(
        default=False,
        description="Put several short examples into one sequence of maxLength tokens, so that no work is spent on padding. Each "
        "example attends only to itself. For causal models only, and not for promptTuning.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="Number format of the computation. auto: bf16 on GPUs that support it, fp16 on older GPUs, fp32 on CPUs.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations in the backward pass. This needs less memory and is about 30 % slower. When absent, "
        "Graft enables it only if the job would otherwise not fit in memory, or only with a very small micro-batch.",
    )
    use_liger_kernel: bool | None = Field(
        default=None,
        description="Use Liger's fused kernels for norms, rotary positions, MLP and loss. They are faster and never hold the "
        "logits of a whole batch. When absent, they are used on GPUs if Liger supports the model's architecture and "
        "the model is not sharded.",
    )
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="How several GPUs train together. ddp: each GPU holds the whole model. fsdp: the model is spread over all "
        "GPUs. auto: fsdp if optim is adamw and either the method is full or the model fits only that way. Otherwise "
        "ddp.",
    )
    logging_steps: int = Field(default=10, ge=1, description="Optimizer steps between two records of the loss.")
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two evaluations of the loss on the held-out examples. Once per epoch when absent.",
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two checkpoints. When absent, one checkpoint every 5 minutes of training. If a node "
        "fails without a warning, the work since the newest checkpoint is lost.",
    )
    save_total_limit: int = Field(
        default=2,
        ge=1,
        le=100,
        description="Number of checkpoints to keep. Older ones are deleted. All are deleted once the version is published.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=2147483647,
        description="Seed of data order, dropout, initialisation, evalSplit, templates and few-shot examples.",
    )
