"""The texts about estimates and choices (PURE), for status and conditions."""

from collections.abc import Sequence

from graft.api.finetunejob import Sizing
from graft.placement.activations import Setup
from graft.placement.choose import Recipe, alternatives, sharded, smallest
from graft.placement.estimate import GIB, training_memory
from graft.placement.offers import GpuKind, NodeOffer

METHODS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "promptTuning": "prompt tuning"}


def gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / GIB:.1f} GiB"


def sizing(
    setup: Setup,
    items: dict[str, int],
    kind: GpuKind | None,
    gpus: int,
    nodes: int,
    host: int | None,
    disk: int,
    source: str,
) -> Sizing:
    """Return the estimate as status.sizing."""
    total = sum(items.values())
    how = f"{setup.precision}, micro-batch {setup.micro_batch} x {setup.length} tokens"
    how += ", gradient checkpointing" if setup.checkpointing else ""
    how += f", {setup.sharding} over {setup.world} processes" if setup.sharding else ""
    each = "each" if gpus * nodes > 1 else ""
    if kind is not None:
        pods = f"{nodes} nodes with {gpus}" if nodes > 1 else str(gpus)
        where = f"{pods} x {kind.product}: {gib(total)} of {gib(kind.memory)} {each}".rstrip()
    else:
        where = f"{'a GPU' if setup.device == 'cuda' else 'CPU'}: {gib(total)} {each}".rstrip()
    return Sizing(
        items=items,
        total_bytes=total,
        gpu=kind.product if kind is not None else None,
        gpu_memory_bytes=kind.memory if kind is not None else None,
        gpus_per_node=gpus,
        nodes=nodes,
        micro_batch=setup.micro_batch,
        gradient_checkpointing=setup.checkpointing,
        sharding=setup.sharding,
        node_memory_bytes=host,
        node_disk_bytes=disk,
        source=source,
        message=f"{where} ({how})",
    )


def too_small(recipe: Recipe, available: Sequence[NodeOffer]) -> str:
    """Return a text about what is needed, what the cluster has, and what would fit."""
    method, size = METHODS[recipe.method.name], recipe.shape.parameters / 1e9
    ways = alternatives(recipe, available)
    remedy = "; ".join([*ways, "otherwise lower spec.training.maxLength, or set spec.resources"])
    return f"{method} of {size:.1f} billion parameters {_need(recipe, available)}; {remedy}"


def _need(recipe: Recipe, available: Sequence[NodeOffer]) -> str:
    kinds = {offer.kind for offer in available if offer.kind is not None}
    if not kinds:
        setup = recipe.setup(None, 0, 1, None)
        if setup is None:
            return "with precision fp16 needs a GPU, and no node that the job may run on has one"
        needed = sum(training_memory(recipe.shape, smallest(recipe, setup)).values())
        largest = max((offer.memory for offer in available), default=0)
        return (
            f"needs {gib(needed)} of memory on a CPU, and a GPU to finish in reasonable time; no node that the job may run on "
            f"has a GPU, and the largest of these nodes has {gib(largest)}"
        )
    kind = max(kinds, key=lambda item: (item.memory, item.product))
    offering = [offer for offer in available if offer.kind == kind]
    gpus = max(offer.gpus for offer in offering)
    world = gpus * len(offering) if sharded(recipe) and not kind.shared else 1
    setup = recipe.setup(kind, world, 1, "fsdp" if world > 1 else None)
    count = f"{len(offering)} node{'s' if len(offering) > 1 else ''}"
    each = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    has = f"the largest GPU of this cluster is {kind.product} with {gib(kind.memory)} ({count} with up to {each})"
    if setup is None:
        return f"with precision {recipe.training.precision} needs a GPU that supports it; {has}"
    needed = sum(training_memory(recipe.shape, smallest(recipe, setup)).values())
    spread = f"on each of {world} GPUs" if world > 1 else "on one GPU"
    if needed <= kind.usable:
        return f"fits on the GPUs, but needs more host memory than the nodes have; {has}"
    return f"needs {gib(needed)} {spread}; {has}"


def warning(recipe: Recipe, setup: Setup, total: int, limit: int, kind: GpuKind | None) -> str:
    """Return the warning that explicit resources look too small."""
    of = f"{kind.product} has {gib(limit)}" if kind is not None else f"the memory limit is {gib(limit)}"
    text = f"spec.resources look too small: the estimate is {gib(total)}, {of}"
    if setup.checkpointing is False and recipe.training.gradient_checkpointing is False:
        text += "; spec.training.gradientCheckpointing: true needs less"
    return f"{text}; if memory runs out, the trainer halves the micro-batch"
