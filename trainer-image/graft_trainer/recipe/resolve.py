"""Resolve the hyperparameters of a run (PURE): the user's value, or a derived value if the spec leaves it open."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graft.api.recipe import SHARDABLE, MethodName, Training
from graft.contracts.job import JobFile
from graft.contracts.progress import Reason
from pydantic.alias_generators import to_camel

from graft_trainer.run.failures import Failure

EFFECTIVE_BATCH = 16  # examples per optimizer step, as in Alpaca and in the QLoRA paper
DEFAULT_EPOCHS = 3.0
LEARNING_RATES: dict[MethodName, float] = {
    "full": 2e-5,  # as in Alpaca and in the fine-tuning of the Llama 2 paper
    "lora": 2e-4,  # QLoRA paper, table 9
    "qlora": 2e-4,
    "promptTuning": 3e-2,  # peft's examples; Lester et al. use 0.3 with Adafactor
}
DEFAULT_MAX_LENGTH = 2048  # tokens
CPU_TOKENS = 8192  # tokens of a micro-batch on a CPU: more tokens are not faster and only take memory
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
    """The device of the run."""

    kind: Literal["cpu", "cuda"]
    bf16: bool = False  # the GPU supports bfloat16
    free_bytes: int | None = None  # free memory of the GPU before the model is loaded


@dataclass(frozen=True)
class ModelFacts:
    """The facts about the model that the memory and the lengths depend on."""

    context: int | None  # longest sequence, tokens
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    liger: bool = False  # Liger has kernels for the architecture, and they work on this device


@dataclass(frozen=True)
class Limits:
    """The values that are known before the examples are tokenised."""

    max_length: int  # tokens
    precision: Precision
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None  # qlora only
    sharding: Sharding | None  # None: one process


@dataclass(frozen=True)
class Resolved:
    """All values that determine the run. The names are the spec's, and wire() returns them in camelCase."""

    num_train_epochs: float
    max_steps: int  # optimizer steps in total
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
    eval_steps: int | None  # None: no examples are held out
    save_steps: int | None  # None: checkpoints are saved by time
    save_total_limit: int
    seed: int
    rank: int | None = None  # only lora and qlora, like the next two
    alpha: float | None = None
    dropout: float | None = None
    virtual_tokens: int | None = None  # promptTuning
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None

    def wire(self) -> dict[str, Any]:
        return {to_camel(name): value for name, value in asdict(self).items() if value is not None}


def limits(job: JobFile, device: Device, context: int | None, world: int = 1) -> Limits:
    """Resolve length, precision and sharding. `world` processes train together. Raises Failure(ConfigurationInvalid) if
    the device, the model or the method does not support what the spec asks for."""
    training, method = job.training, job.method
    check_packing(job)
    check_sharding(job, world)
    if training.optim == "adamw8bit" and device.kind == "cpu":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "spec.training.optim is adamw8bit, which needs a GPU, but the job has none",
            "Use adamw or adafactor, or request nvidia.com/gpu in spec.resources.limits.",
        )
    if training.use_liger_kernel and device.kind == "cpu":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "spec.training.useLigerKernel is true, which needs a GPU, but the job has none",
            "Remove spec.training.useLigerKernel, or request nvidia.com/gpu in spec.resources.limits.",
        )
    room, taken = context, ""
    if context is not None and method.prompt_tuning is not None:
        room = context - method.prompt_tuning.virtual_tokens
        taken = f" less {method.prompt_tuning.virtual_tokens} virtual tokens"
    if room is not None and room < 8:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the model's context is {context} tokens{taken}, which leaves no room for examples",
            "Lower spec.method.promptTuning.virtualTokens." if taken else "Use a base model with a longer context.",
        )
    length = training.max_length or min(room or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if room is not None and length > room:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"spec.training.maxLength is {length}, but the model's context is {context} tokens{taken}",
            f"Set spec.training.maxLength to at most {room}.",
        )
    precision = _precision(training, device)
    compute = None
    if method.qlora is not None:
        compute = method.qlora.compute_dtype or COMPUTE_DTYPES[precision]
    return Limits(length, precision, compute, _sharding(job, world))


def check_packing(job: JobFile) -> None:
    """Check training.packing, before anything is loaded. Raises Failure(ConfigurationInvalid) if the job packs but its
    task or method does not support that."""
    if not job.training.packing:
        return
    why = None
    if job.task == "seq2seq":
        why = "the base model is seq2seq: positions cannot separate the examples in its encoder and decoder"
    elif job.method.prompt_tuning is not None:
        why = (
            "promptTuning puts its vectors only once before a sequence, so only the first example in it would have them"
        )
    if why is not None:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"spec.training.packing is true, but {why}",
            "Set spec.training.packing to false.",
        )


def check_sharding(job: JobFile, world: int) -> None:
    """Check training.optim. Raises Failure(ConfigurationInvalid) if fsdp shards the weights but the optimizer does not
    support that."""
    if _sharding(job, world) != "fsdp" or job.training.optim in SHARDABLE:
        return
    raise Failure(
        Reason.CONFIGURATION_INVALID,
        f"spec.training.optim is {job.training.optim}, which does not support weights that are sharded (fsdp) over {world} processes",
        f"Use {' or '.join(SHARDABLE)}, or set spec.training.sharding to ddp.",
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
    """Return all values. `examples` is the number of training examples (with packing, of packs). The longest has
    `longest` tokens after truncation. Raises Failure(OutOfMemory) if the micro-batch cannot be halved `halvings`
    times."""
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
    # The learning rate of the first warmup step is 0, so a run of warmup steps alone would train nothing.
    warmup = 0 if training.lr_scheduler_type == "constant" else min(rising, steps - 1)
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
    """Return the optimizer steps of one epoch, as transformers and accelerate count them: the micro-batches are
    distributed over the processes, each process gets the same number (filled up from the start), and the last step may
    be smaller."""
    per_process = math.ceil(math.ceil(examples / batch) / world)
    return max(1, math.ceil(per_process / accumulation))


def halve(
    batch: int, accumulation: int, halvings: int, max_length: int, checkpointing: bool, method: MethodName
) -> tuple[int, int]:
    """Return (examples per micro-batch, micro-batches per step) after `halvings` attempts that ran out of memory.

    The number of examples per step stays the same. If half of a micro-batch does not divide it, the next smaller size
    that divides it is used. Raises Failure(OutOfMemory) if a micro-batch of one example has run out of memory.
    """
    effective, first = batch * accumulation, batch
    for _ in range(halvings):
        if batch == 1:
            raise _too_large(first, max_length, checkpointing, method)
        batch = next(size for size in range(batch // 2, 0, -1) if effective % size == 0)
    return batch, effective // batch


def _too_large(first: int, max_length: int, checkpointing: bool, method: MethodName) -> Failure:
    ways = [f"Lower spec.training.maxLength (it is {max_length}) to {max(8, max_length // 2)}"]
    if not checkpointing:
        ways.append("set spec.training.gradientCheckpointing to true")
    if method in {"full", "lora"}:
        ways.append("use method qlora, which needs a quarter of the memory for the base model")
    ways.append("request a GPU with more memory")
    started = f" (the first attempt had {first})" if first > 1 else ""
    return Failure(
        Reason.OUT_OF_MEMORY,
        f"memory ran out with micro-batches of 1 example of up to {max_length} tokens{started}; a micro-batch cannot be smaller",
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
            "spec.training.precision is fp16, which needs a GPU, but the job has none",
            "Set spec.training.precision to auto, or request nvidia.com/gpu in spec.resources.limits.",
        )
    if wanted == "bf16" and device.kind == "cuda" and not device.bf16:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "spec.training.precision is bf16, which this GPU does not support",
            "Set spec.training.precision to auto or fp16.",
        )
    return wanted


def _liger(training: Training, known: Limits, device: Device, model: ModelFacts) -> bool:
    if training.use_liger_kernel and not model.liger:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "spec.training.useLigerKernel is true, but Liger has no kernels for the base model's architecture, or its kernels "
            "do not work on this GPU. In the second case the log shows why",
            "Remove spec.training.useLigerKernel, or set it to false.",
        )
    if training.use_liger_kernel is not None:
        return training.use_liger_kernel
    # Liger's loss reads the head's weights without calling the head. FSDP gathers a sharded head only for a call.
    return device.kind == "cuda" and model.liger and known.sharding != "fsdp"


def _gradient_checkpointing(
    job: JobFile, known: Limits, device: Device, model: ModelFacts, longest: int, world: int
) -> bool:
    """Return the spec's value, else placement's value, else whether the longest example does not fit in memory without
    it."""
    for given in (job.training.gradient_checkpointing, job.choice.gradient_checkpointing):
        if given is not None:
            return given
    if device.kind == "cpu" or device.free_bytes is None:
        return False
    return _token_budget(job, known, device, model, False, world) < longest


def _batch(
    job: JobFile, known: Limits, device: Device, model: ModelFacts, longest: int, checkpointing: bool, world: int
) -> tuple[int, int]:
    """Return (examples per micro-batch, micro-batches per step) of each process. If the spec sets neither, all
    processes together take about EFFECTIVE_BATCH examples per step."""
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
    """Return how many tokens of a micro-batch fit in memory beside the weights, their gradients and their optimizer
    state.

    `full` keeps float32 weights, gradients and two moments, 16 bytes per parameter, which fsdp spreads over the
    processes. Logits and their gradient are float32. With Liger, at most hidden_size logits per token are in memory at
    once.
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
