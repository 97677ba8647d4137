"""Choose the GPUs of a training (PURE): the fewest that the estimate fits on, and among those the smallest.

One GPU is preferred to several, one node to several nodes, then the least memory per GPU. On the chosen GPU, the
micro-batch grows by powers of two up to an effective batch of 16. Gradient checkpointing is used only if it allows a
larger micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graft.api.recipe import SHARDABLE, Lora, Method, QLora, Training
from graft.placement.activations import WIDTH, Setup
from graft.placement.blocks import Geometry
from graft.placement.estimate import GIB, loaded_bytes, trained_parameters, training_memory
from graft.placement.offers import GpuKind, NodeOffer

EFFECTIVE_BATCH = 16  # examples; the trainer's default if the spec does not set it
ENOUGH = 4  # examples: this micro-batch keeps a GPU busy; a larger one is not worth recomputing activations
DEFAULT_MAX_LENGTH = 2048  # tokens; the trainer has the same default
PROCESS = 6 * GIB  # bytes of host memory of a GPU process: python, torch, CUDA libraries; the data is memory-mapped
DISK = GIB  # bytes for the dataset, its tokens (4 bytes each), the suites and the caches of libraries
CPUS_PER_GPU = 4
# GPUs on the market, to suggest GPUs that would fit: GB in the name -> GiB that the device reports.
MARKET = {16: 15.0, 24: 22.4, 40: 39.5, 48: 44.9, 80: 79.6, 141: 140.0, 180: 178.0}


@dataclass(frozen=True)
class Recipe:
    """The parts of a job that decide its memory."""

    shape: Geometry
    method: Method
    training: Training
    length: int  # tokens of the longest sequence
    download: int = 0  # bytes of the base model's files that each pod downloads to its disk

    def setup(
        self, kind: GpuKind | None, gpus: int, nodes: int, sharding: Literal["ddp", "fsdp"] | None
    ) -> Setup | None:
        """Return the setup on this hardware, or None if the hardware does not support the spec's precision."""
        wanted = self.training.precision
        if wanted == "auto":
            wanted = "fp32" if kind is None else "bf16" if kind.bf16 else "fp16"
        if (kind is None and wanted == "fp16") or (kind is not None and wanted == "bf16" and not kind.bf16):
            return None
        return Setup(
            method=self.method,
            precision=wanted,
            length=self.length,
            optim=self.training.optim,
            device="cpu" if kind is None else "cuda",
            world=max(1, gpus) * nodes,
            sharding=sharding,
        )


@dataclass(frozen=True)
class Fit:
    """Hardware on which the job fits, and the setup of the run on it."""

    kind: GpuKind
    gpus: int  # of each pod
    nodes: int
    setup: Setup
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


def longest_sequence(
    training: Training, context: int | None, method: Method, known: int | None, *, causal: bool
) -> int:
    """Return the tokens of the longest sequence: the spec's maxLength or the trainer's default, plus promptTuning's
    virtual tokens. Without packing, it is at most the longest example, if that is known."""
    virtual = method.prompt_tuning.virtual_tokens if method.prompt_tuning is not None else 0
    room = max(8, context - (virtual if causal else 0)) if context is not None else DEFAULT_MAX_LENGTH
    length = training.max_length or min(room, DEFAULT_MAX_LENGTH)
    if known is not None and not training.packing:
        length = min(length, max(1, known))
    return length + virtual


def best(recipe: Recipe, available: Sequence[NodeOffer]) -> Fit | None:
    """Return the smallest hardware on which the job fits, or None."""
    for kind, gpus, nodes in _candidates(recipe, available):
        setup = recipe.setup(kind, gpus, nodes, "fsdp" if gpus * nodes > 1 else None)
        fitting = fit(recipe, setup, kind.usable) if setup is not None else None
        if fitting is None:
            continue
        needed = host_memory(recipe, fitting, gpus)
        if sum(offer.kind == kind and offer.gpus >= gpus and offer.memory >= needed for offer in available) >= nodes:
            return Fit(kind, gpus, nodes, fitting, training_memory(recipe.shape, fitting))
    return None


def fit(recipe: Recipe, setup: Setup, memory: int) -> Setup | None:
    """Return the setup with the best micro-batch and checkpointing within `memory` bytes, or None if nothing fits."""
    given = recipe.training.gradient_checkpointing
    plain = _largest(recipe, replace(setup, checkpointing=False), memory) if given is not True else None
    if given is False or (plain is not None and plain.micro_batch >= min(ENOUGH, most(recipe, setup))):
        return plain
    saving = _largest(recipe, replace(setup, checkpointing=True), memory)
    if plain is not None and (saving is None or saving.micro_batch <= plain.micro_batch):
        return plain
    return saving


def most(recipe: Recipe, setup: Setup) -> int:
    """Return the largest useful micro-batch: the spec's, or the one that reaches EFFECTIVE_BATCH."""
    if recipe.training.per_device_train_batch_size is not None:
        return recipe.training.per_device_train_batch_size
    return max(1, EFFECTIVE_BATCH // ((recipe.training.gradient_accumulation_steps or 1) * setup.world))


def smallest(recipe: Recipe, setup: Setup) -> Setup:
    """Return the same run with the least memory: one example at a time and gradient checkpointing, unless the spec sets
    them."""
    return replace(
        setup,
        micro_batch=recipe.training.per_device_train_batch_size or 1,
        checkpointing=recipe.training.gradient_checkpointing is not False,
    )


def _largest(recipe: Recipe, setup: Setup, memory: int) -> Setup | None:
    fixed = recipe.training.per_device_train_batch_size
    size = fixed if fixed is not None else 2 ** (most(recipe, setup).bit_length() - 1)
    while size >= (fixed or 1):
        tried = replace(setup, micro_batch=size)
        if sum(training_memory(recipe.shape, tried).values()) <= memory:
            return tried
        size //= 2
    return None


def sharded(recipe: Recipe) -> bool:
    """Return whether more GPUs reduce the memory of each GPU.

    They do not with 4-bit weights, with ddp, or with optimizers that need whole weights.
    """
    return recipe.method.qlora is None and recipe.training.sharding != "ddp" and recipe.training.optim in SHARDABLE


def _candidates(recipe: Recipe, available: Sequence[NodeOffer]) -> Iterator[tuple[GpuKind, int, int]]:
    """Yield (kind, GPUs of a node, nodes), the smallest first."""
    found: set[tuple[GpuKind, int, int]] = set()
    for kind in {offer.kind for offer in available if offer.kind is not None}:
        per_node = [offer.gpus for offer in available if offer.kind == kind]
        found.add((kind, 1, 1))
        if not sharded(recipe) or kind.shared:
            continue
        widest = max(per_node)
        found |= {(kind, gpus, 1) for gpus in _doublings(widest)}
        found |= {(kind, widest, nodes) for nodes in _doublings(per_node.count(widest))}
    yield from sorted(found, key=lambda item: (item[1] * item[2], item[2], item[0].memory, item[0].product))


def _doublings(limit: int) -> set[int]:
    """Return 2, 4, 8 … up to the limit, and the limit itself."""
    return {count for count in (2**power for power in range(1, limit.bit_length())) if count <= limit} | {max(1, limit)}


def host_memory(recipe: Recipe, setup: Setup, gpus: int) -> int:
    """Return the bytes of host memory that a pod with GPUs needs, in whole GiB.

    It holds the processes, the weights while they are loaded, and a checkpoint (trained weights and the optimizer's
    state) while it is uploaded.
    """
    needed = gpus * PROCESS + loaded_bytes(recipe.shape, setup) + _checkpoint(recipe, setup, gpus)
    return -(-needed // GIB) * GIB


def disk(recipe: Recipe, setup: Setup, gpus: int) -> int:
    """Return the bytes of node disk that a pod needs, in whole GiB.

    It holds the data, the base model's files, a checkpoint while it is uploaded, and the files to publish.
    """
    trained = trained_parameters(recipe.shape, setup)
    published = trained * (WIDTH[recipe.shape.dtype] if recipe.method.full is not None else 4)
    needed = DISK + recipe.download + _checkpoint(recipe, setup, gpus) + published
    return -(-needed // GIB) * GIB


def _checkpoint(recipe: Recipe, setup: Setup, gpus: int) -> int:
    """Return the bytes of a pod's part of a checkpoint: float32 weights and AdamW's two moments."""
    return 12 * trained_parameters(recipe.shape, setup) // max(1, setup.shards) * max(1, gpus)


def alternatives(recipe: Recipe, available: Sequence[NodeOffer]) -> list[str]:
    """Return texts about what would fit: a lighter optimizer or method on this cluster, and the recipe on other GPUs."""
    ways = []
    if recipe.training.optim not in SHARDABLE:
        training = recipe.training.model_copy(update={"optim": SHARDABLE[0]})
        other = best(replace(recipe, training=training), available)
        if other is not None:
            count, optim = other.gpus * other.nodes, recipe.training.optim
            ways.append(
                f"spec.training.optim {optim} cannot be sharded; with {SHARDABLE[0]} the job would fit on {count} x {other.kind.product} "
                "of this cluster"
            )
    for method in (Method(lora=Lora()), Method(qlora=QLora())):
        order = ("full", "lora", "qlora")
        if recipe.method.name not in order or order.index(method.name) <= order.index(recipe.method.name):
            continue
        other = best(replace(recipe, method=method), available)
        if other is not None:
            count = other.gpus * other.nodes
            ways.append(
                f"with spec.method.{method.name} the job would fit on {count} x {other.kind.product} of this cluster"
            )
            break
    for gpus in (1, 2, 4, 8, 16, 32) if sharded(recipe) else (1,):
        for gigabytes, shown in MARKET.items():
            memory = int(shown * GIB)
            kind = GpuKind("GPU", memory, bf16=True)
            setup = recipe.setup(kind, gpus, 1, "fsdp" if gpus > 1 else None)
            if setup is not None and fit(recipe, setup, kind.usable) is not None:
                return [*ways, f"the job would fit on {gpus} GPU{'s' if gpus > 1 else ''} of {gigabytes} GB"]
    return ways
