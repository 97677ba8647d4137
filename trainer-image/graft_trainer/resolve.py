"""The hyperparameters in force (PURE): what the user wrote, and a derived value wherever the spec leaves it open."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graft.api.recipe import Lora, Method, QLora, Training
from graft.contracts import Reason
from pydantic.alias_generators import to_camel

from graft_trainer.failures import Failure

EFFECTIVE_BATCH = 16  # examples per optimizer step, Alpaca's and the QLoRA paper's
DEFAULT_EPOCHS = 3.0
DEFAULT_LEARNING_RATE = 2e-4  # QLoRA paper, table 9
DEFAULT_MAX_LENGTH = 2048
CPU_TOKENS = 8192  # tokens of a micro-batch on a CPU: more is no faster and only takes memory
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """What the run computes on."""

    kind: Literal["cpu", "cuda"]
    bf16: bool = False  # the GPU has bfloat16
    free_bytes: int | None = None  # of the GPU's memory, before the model is loaded


@dataclass(frozen=True)
class ModelFacts:
    """What the memory and the lengths depend on."""

    context: int | None  # longest sequence, tokens
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int


@dataclass(frozen=True)
class Limits:
    """What is known before the examples are tokenised."""

    max_length: int  # tokens
    precision: Precision
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None  # qlora only


@dataclass(frozen=True)
class Resolved:
    """Everything that decides the run. Names as in the spec; camelCase with wire()."""

    num_train_epochs: float
    max_steps: int  # optimizer steps in all
    learning_rate: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    optim: str
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    max_length: int
    packing: bool
    precision: Precision
    gradient_checkpointing: bool
    sharding: Literal["ddp", "fsdp"] | None  # None: one process
    logging_steps: int
    eval_steps: int | None  # None: nothing is held out
    save_steps: int | None  # None: by time
    save_total_limit: int
    seed: int
    rank: int
    alpha: float
    dropout: float
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None

    def wire(self) -> dict[str, Any]:
        return {to_camel(name): value for name, value in asdict(self).items() if value is not None}


def limits(training: Training, method: Method, device: Device, context: int | None) -> Limits:
    """Length and precision. Failure(ConfigurationInvalid) when the device or the model cannot do what was asked for."""
    length = training.max_length or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if context is not None and length > context:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"training.maxLength is {length}, the model's context is {context} tokens",
            f"Set training.maxLength to at most {context}.",
        )
    precision = _precision(training, device)
    compute = None
    if method.qlora is not None:
        default = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        compute = method.qlora.compute_dtype or default
    return Limits(length, precision, compute)  # type: ignore[arg-type]


def resolve(
    training: Training,
    method: Method,
    known: Limits,
    device: Device,
    model: ModelFacts,
    *,
    examples: int,
    longest: int,
    held_out: bool,
) -> Resolved:
    """All values. `examples` are learned from, the longest has `longest` tokens after truncation."""
    batch, accumulation = _batch(training, method, known, device, model, longest)
    per_epoch = steps_per_epoch(examples, batch, accumulation)
    epochs = training.num_train_epochs or DEFAULT_EPOCHS
    if training.max_steps is not None:
        steps, epochs = training.max_steps, round(training.max_steps / per_epoch, 4)
    else:
        steps = max(1, math.ceil(epochs * per_epoch))
    lora: Lora = method.low_rank or Lora()
    rising = training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * steps)
    warmup = 0 if training.lr_scheduler_type == "constant" else min(rising, steps)
    return Resolved(
        num_train_epochs=epochs,
        max_steps=steps,
        learning_rate=training.learning_rate or DEFAULT_LEARNING_RATE,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        world_size=1,
        optim=training.optim,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        max_length=known.max_length,
        packing=training.packing,
        precision=known.precision,
        gradient_checkpointing=bool(training.gradient_checkpointing),
        sharding=None,
        logging_steps=training.logging_steps,
        eval_steps=(training.eval_steps or per_epoch) if held_out else None,
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        seed=training.seed,
        rank=lora.rank,
        alpha=lora.alpha if lora.alpha is not None else 2.0 * lora.rank,
        dropout=lora.dropout,
        quant_type=lora.quant_type if isinstance(lora, QLora) else None,
        double_quant=lora.double_quant if isinstance(lora, QLora) else None,
        compute_dtype=known.compute_dtype,
    )


def steps_per_epoch(examples: int, batch: int, accumulation: int) -> int:
    """Optimizer steps of a pass, as transformers counts them: the last of each may be smaller."""
    return max(1, math.ceil(math.ceil(examples / batch) / accumulation))


def _precision(training: Training, device: Device) -> Precision:
    wanted = training.precision
    if wanted == "auto":
        return "fp32" if device.kind == "cpu" else "bf16" if device.bf16 else "fp16"
    if wanted == "fp16" and device.kind == "cpu":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "training.precision is fp16, which needs a GPU; the job has none",
            "Leave training.precision at auto, or ask for nvidia.com/gpu in resources.limits.",
        )
    if wanted == "bf16" and device.kind == "cuda" and not device.bf16:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "training.precision is bf16, which this GPU does not have",
            "Leave training.precision at auto or set it to fp16.",
        )
    return wanted


def _batch(
    training: Training, method: Method, known: Limits, device: Device, model: ModelFacts, longest: int
) -> tuple[int, int]:
    """(examples per micro-batch, micro-batches per step)."""
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if batch is None:
        most = max(1, EFFECTIVE_BATCH // (accumulation or 1))
        tokens = _token_budget(method, known, device, model, bool(training.gradient_checkpointing))
        batch = most
        while batch > 1 and batch * longest > tokens:
            batch //= 2
    if accumulation is None:
        accumulation = max(1, round(EFFECTIVE_BATCH / batch))
    return batch, accumulation


def _token_budget(method: Method, known: Limits, device: Device, model: ModelFacts, checkpointing: bool) -> int:
    """Tokens of a micro-batch that fit beside the weights.

    Activations are 34 bytes per token, layer and hidden unit at 16 bits (Korthikanti et al. 2022, eq. 2, without the
    attention scores, which sdpa does not keep), 2 when they are recomputed; logits and their gradient are float32.
    """
    if device.kind == "cpu" or device.free_bytes is None:
        return CPU_TOKENS
    wide = 2 if known.precision == "fp32" else 1
    weights = model.parameters * (0.6 if method.name == "qlora" else 2 * wide)
    per_layer = (2 if checkpointing else 34) * wide * model.hidden_size
    extra = 34 * wide * model.hidden_size if checkpointing else 0  # the layer that is being recomputed
    per_token = model.layers * per_layer + extra + 3 * 4 * model.vocab_size
    return max(1, int((0.8 * device.free_bytes - weights) / per_token))
