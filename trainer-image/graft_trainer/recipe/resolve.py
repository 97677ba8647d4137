"""The hyperparameters in force (PURE): what the user wrote, and a derived value wherever the spec leaves it open."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graft.api.recipe import SHARDABLE, MethodName, Training
from graft.contracts.job import JobFile
from graft.contracts.progress import Reason
from pydantic.alias_generators import to_camel

from graft_trainer.run.failures import Failure

EFFECTIVE_BATCH = 16  # examples per optimizer step, Alpaca's and the QLoRA paper's
DEFAULT_EPOCHS = 3.0
LEARNING_RATES: dict[MethodName, float] = {
    "full": 2e-5,  # Alpaca's, and that of the Llama 2 paper's fine-tuning
    "lora": 2e-4,  # QLoRA paper, table 9
    "qlora": 2e-4,
    "promptTuning": 3e-2,  # peft's examples; Lester et al. use 0.3 with Adafactor
}
DEFAULT_MAX_LENGTH = 2048
CPU_TOKENS = 8192  # tokens of a micro-batch on a CPU: more is no faster and only takes memory
GRADIENT_CHECKPOINTING_KEEPS = 2  # bytes per token, layer and hidden unit at 16 bits: the input of each layer
ACTIVATIONS = 34  # Korthikanti et al. 2022, eq. 2, without the attention scores, which sdpa does not keep
Precision = Literal["bf16", "fp16", "fp32"]
Sharding = Literal["ddp", "fsdp"]
COMPUTE_DTYPES: dict[Precision, Literal["bfloat16", "float16", "float32"]] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


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
    liger: bool = False  # Liger has kernels for the architecture, and they work here


@dataclass(frozen=True)
class Limits:
    """What is known before the examples are tokenised."""

    max_length: int  # tokens
    precision: Precision
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None  # qlora only
    sharding: Sharding | None  # None: one process


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
    use_liger_kernel: bool
    sharding: Sharding | None  # None: one process
    logging_steps: int
    eval_steps: int | None  # None: nothing is held out
    save_steps: int | None  # None: by time
    save_total_limit: int
    seed: int
    rank: int | None = None  # lora and qlora, as the next two
    alpha: float | None = None
    dropout: float | None = None
    virtual_tokens: int | None = None  # promptTuning
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None

    def wire(self) -> dict[str, Any]:
        return {to_camel(name): value for name, value in asdict(self).items() if value is not None}


def limits(job: JobFile, device: Device, context: int | None, world: int = 1) -> Limits:
    """Length, precision and sharding. `world` processes train together. Failure(ConfigurationInvalid) when the device,
    the model or the method cannot do what was asked for."""
    training, method = job.training, job.method
    check_packing(job)
    check_sharding(job, world)
    if training.optim == "adamw8bit" and device.kind == "cpu":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "training.optim is adamw8bit, which needs a GPU; the job has none",
            "Use adamw or adafactor, or ask for nvidia.com/gpu in resources.limits.",
        )
    if training.use_liger_kernel and device.kind == "cpu":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "training.useLigerKernel is true, which needs a GPU; the job has none",
            "Leave training.useLigerKernel out, or ask for nvidia.com/gpu in resources.limits.",
        )
    room, taken = context, ""
    if context is not None and method.prompt_tuning is not None:
        room = context - method.prompt_tuning.virtual_tokens
        taken = f" less {method.prompt_tuning.virtual_tokens} virtual tokens"
    if room is not None and room < 8:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the model's context of {context} tokens{taken} leaves no room for examples",
            "Lower method.promptTuning.virtualTokens.",
        )
    length = training.max_length or min(room or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if room is not None and length > room:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"training.maxLength is {length}, the model's context is {context} tokens{taken}",
            f"Set training.maxLength to at most {room}.",
        )
    precision = _precision(training, device)
    compute = None
    if method.qlora is not None:
        compute = method.qlora.compute_dtype or COMPUTE_DTYPES[precision]
    return Limits(length, precision, compute, _sharding(job, world))


def check_packing(job: JobFile) -> None:
    """Failure(ConfigurationInvalid) when the job packs where that cannot be done; known before anything is loaded."""
    if not job.training.packing:
        return
    why = None
    if job.task == "seq2seq":
        why = "the base model is seq2seq: its encoder and decoder cannot be kept apart by positions"
    elif job.method.prompt_tuning is not None:
        why = "promptTuning puts its vectors before a sequence once, so all but the first example in it would lack them"
    if why is not None:
        raise Failure(
            Reason.CONFIGURATION_INVALID, f"training.packing is true, but {why}", "Set training.packing to false."
        )


def check_sharding(job: JobFile, world: int) -> None:
    """Failure(ConfigurationInvalid) when the job's optimizer cannot do with a part of each weight, which it gets from fsdp."""
    if _sharding(job, world) != "fsdp" or job.training.optim in SHARDABLE:
        return
    raise Failure(
        Reason.CONFIGURATION_INVALID,
        f"training.optim is {job.training.optim}, which does not know weights that are sharded (fsdp) over {world} processes",
        f"Use {' or '.join(SHARDABLE)}, or set training.sharding to ddp.",
    )


def resolve(
    job: JobFile,
    known: Limits,
    device: Device,
    model: ModelFacts,
    *,
    examples: int,
    longest: int,
    held_out: bool,
    world: int = 1,
    halvings: int = 0,
) -> Resolved:
    """All values. `examples` are learned from (packed ones, when packing), the longest has `longest` tokens after
    truncation. Failure(OutOfMemory) when the micro-batch cannot be halved as often as `halvings`."""
    training, method = job.training, job.method
    checkpointing = _gradient_checkpointing(job, known, device, model, longest, world)
    batch, accumulation = _batch(job, known, device, model, longest, checkpointing, world)
    batch, accumulation = halve(batch, accumulation, halvings, known.max_length, checkpointing, method.name)
    per_epoch = steps_per_epoch(examples, batch, accumulation, world)
    epochs = training.num_train_epochs or DEFAULT_EPOCHS
    if training.max_steps is not None:
        steps, epochs = training.max_steps, round(training.max_steps / per_epoch, 4)
    else:
        steps = max(1, math.ceil(epochs * per_epoch))
    rising = training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * steps)
    warmup = 0 if training.lr_scheduler_type == "constant" else min(rising, steps)
    lora, qlora, prompt = method.low_rank, method.qlora, method.prompt_tuning
    return Resolved(
        num_train_epochs=epochs,
        max_steps=steps,
        learning_rate=training.learning_rate or LEARNING_RATES[method.name],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        world_size=world,
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
        gradient_checkpointing=checkpointing,
        use_liger_kernel=_liger(training, known, device, model),
        sharding=known.sharding,
        logging_steps=training.logging_steps,
        eval_steps=(training.eval_steps or per_epoch) if held_out else None,
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        seed=training.seed,
        rank=lora.rank if lora else None,
        alpha=(lora.alpha if lora.alpha is not None else 2.0 * lora.rank) if lora else None,
        dropout=lora.dropout if lora else None,
        virtual_tokens=prompt.virtual_tokens if prompt else None,
        quant_type=qlora.quant_type if qlora else None,
        double_quant=qlora.double_quant if qlora else None,
        compute_dtype=known.compute_dtype,
    )


def steps_per_epoch(examples: int, batch: int, accumulation: int, world: int = 1) -> int:
    """Optimizer steps of a pass, as transformers and accelerate count them: micro-batches are dealt out to the processes,
    each gets as many (the last are filled up from the start), and the last step may be smaller."""
    per_process = math.ceil(math.ceil(examples / batch) / world)
    return max(1, math.ceil(per_process / accumulation))


def halve(
    batch: int, accumulation: int, halvings: int, max_length: int, checkpointing: bool, method: MethodName
) -> tuple[int, int]:
    """(examples per micro-batch, micro-batches per step) after `halvings` attempts that ran out of memory.

    The examples per step stay the same, so of a micro-batch that cannot be halved the next smaller one is taken that
    divides them. Failure(OutOfMemory) when one of a single example has run out of memory.
    """
    effective, first = batch * accumulation, batch
    for _ in range(halvings):
        if batch == 1:
            raise _too_large(first, max_length, checkpointing, method)
        batch = next(size for size in range(batch // 2, 0, -1) if effective % size == 0)
    return batch, effective // batch


def _too_large(first: int, max_length: int, checkpointing: bool, method: MethodName) -> Failure:
    ways = [f"Lower training.maxLength (it is {max_length}) to {max(8, max_length // 2)}"]
    if not checkpointing:
        ways.append("set training.gradientCheckpointing to true")
    if method in {"full", "lora"}:
        ways.append("use method qlora, which holds the base model in a quarter of the memory")
    ways.append("ask for a GPU with more memory")
    started = f", after {first} at first" if first > 1 else ""
    return Failure(
        Reason.OUT_OF_MEMORY,
        f"memory ran out with micro-batches of 1 example of up to {max_length} tokens{started}: there is no smaller one",
        f"{', '.join(ways[:-1])}, or {ways[-1]}.",
    )


def _sharding(job: JobFile, world: int) -> Sharding | None:
    if world == 1:
        return None
    if job.training.sharding != "auto":
        return job.training.sharding
    whole = job.method.full is not None and job.training.optim in SHARDABLE
    return job.choice.sharding or ("fsdp" if whole else "ddp")


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


def _liger(training: Training, known: Limits, device: Device, model: ModelFacts) -> bool:
    if training.use_liger_kernel and not model.liger:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "training.useLigerKernel is true, but Liger has no kernels for the base model's architecture, or they do not "
            "work here; in that case the log says why",
            "Leave training.useLigerKernel out, or set it to false.",
        )
    if training.use_liger_kernel is not None:
        return training.use_liger_kernel
    # Its loss reads the head's weights past the head, which is not what a sharded head expects.
    return device.kind == "cuda" and model.liger and known.sharding != "fsdp"


def _gradient_checkpointing(
    job: JobFile, known: Limits, device: Device, model: ModelFacts, longest: int, world: int
) -> bool:
    """What the spec says, else placement, else only where the longest example would not fit without it."""
    for given in (job.training.gradient_checkpointing, job.choice.gradient_checkpointing):
        if given is not None:
            return given
    if device.kind == "cpu" or device.free_bytes is None:
        return False
    return _token_budget(job, known, device, model, False, world) < longest


def _batch(
    job: JobFile, known: Limits, device: Device, model: ModelFacts, longest: int, checkpointing: bool, world: int
) -> tuple[int, int]:
    """(examples per micro-batch, micro-batches per step), of each process; EFFECTIVE_BATCH in all where both are open."""
    training = job.training
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if batch is None:
        most = max(1, EFFECTIVE_BATCH // ((accumulation or 1) * world))
        if job.choice.micro_batch is not None:
            batch = min(most, job.choice.micro_batch)
        else:
            tokens = _token_budget(job, known, device, model, checkpointing, world)
            batch = most
            while batch > 1 and batch * longest > tokens:
                batch //= 2
    if accumulation is None:
        accumulation = max(1, round(EFFECTIVE_BATCH / (batch * world)))
    return batch, accumulation


def _token_budget(
    job: JobFile, known: Limits, device: Device, model: ModelFacts, checkpointing: bool, world: int
) -> int:
    """Tokens of a micro-batch that fit beside the weights and what is kept for each of them.

    `full` keeps float32 weights and gradients and two moments, 16 bytes per parameter, which fsdp spreads over the
    processes. Logits and their gradient are float32; Liger holds so many at once as the last layer has outputs.
    """
    method = job.method
    if device.kind == "cpu" or device.free_bytes is None:
        return CPU_TOKENS
    wide = 2 if known.precision == "fp32" else 1
    per_parameter = 16.0 if method.full is not None else 0.6 if method.qlora is not None else 2.0 * wide
    weights = model.parameters * per_parameter / (world if known.sharding == "fsdp" else 1)
    per_layer = (GRADIENT_CHECKPOINTING_KEEPS if checkpointing else ACTIVATIONS) * wide * model.hidden_size
    extra = ACTIVATIONS * wide * model.hidden_size if checkpointing else 0  # the layer that is being recomputed
    logits = (
        min(model.hidden_size, model.vocab_size) if _liger(job.training, known, device, model) else model.vocab_size
    )
    per_token = model.layers * per_layer + extra + 3 * 4 * logits
    return max(1, int((0.8 * device.free_bytes - weights) / per_token))
