"""The placement of a job (PURE): its pods' resources and node selector, the settings for the trainer, and
status.sizing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from graft.api.basemodel import ModelFacts
from graft.api.finetunejob import Sizing
from graft.api.meta import GPU, Placement, Resources
from graft.api.quantity import quantity
from graft.api.recipe import Method, Training
from graft.contracts.job import Choice
from graft.placement.activations import Setup
from graft.placement.blocks import FactsMissing, geometry
from graft.placement.choose import (
    CPUS_PER_GPU,
    Fit,
    Recipe,
    best,
    disk,
    fit,
    host_memory,
    longest_sequence,
    sharded,
    smallest,
)
from graft.placement.estimate import GIB, training_memory
from graft.placement.explain import gib, too_small, warning
from graft.placement.explain import sizing as sizing_of
from graft.placement.offers import GpuKind, Node, NodeOffer, offers

LARGEST_ON_CPU = 1_000_000_000  # parameters; a larger model takes days on a CPU and an hour on a GPU
CPU_TOKENS = 8192  # tokens of a micro-batch on a CPU; the trainer has the same limit
MOST_CPUS = 8  # models that fit a CPU have matrices too small to keep more cores busy
# Peaks of up to 1.34 times the estimate were seen, with 400 MiB of pages of libraries that the kernel can free.
CPU_MARGIN = 1.3
STEP = 256 * 2**20  # bytes; memory requests are multiples of it
DISK = "ephemeral-storage"


class DoesNotFit(Exception):
    """The estimate does not fit on the cluster.

    The message says what is needed, what the cluster has, and what would fit.
    """


@dataclass(frozen=True)
class Decision:
    """Where and how a job runs."""

    sizing: Sizing
    resources: Resources | None  # of each pod; None for the API's default
    nodes: int = 1
    node_selector: dict[str, str] = field(default_factory=dict)  # in addition to the spec's
    choice: Choice = field(default_factory=Choice)


def training(
    facts: ModelFacts | None,
    method: Method,
    training: Training,
    *,
    task: Literal["causal", "seq2seq"],
    nodes: Iterable[Node],
    placement: Placement,
    spot_taints: Sequence[str] = (),
    explicit: Resources | None = None,
    nodes_wanted: int | None = None,
    dataset_max_length: int | None = None,
    download: int = 0,
) -> Decision:
    """Place a training.

    nodes: Node objects of the Kubernetes API. spot_taints: taint keys that the job tolerates because it may run on spot
    nodes. explicit, nodes_wanted: the spec's resources and number of pods, which are kept unchanged.
    dataset_max_length: tokens of the longest example, if known. download: bytes of the base model's files that each pod
    downloads. Raises DoesNotFit if the job does not fit on the cluster.
    """
    try:
        shape = geometry(facts or ModelFacts())
    except FactsMissing as missing:
        return _blind(missing.names, explicit, nodes_wanted or 1)
    context = facts.context_length if facts is not None else None
    length = longest_sequence(training, context, method, dataset_max_length, causal=task == "causal")
    recipe = Recipe(shape, method, training, length, download)
    available = offers(nodes, placement, spot_taints)
    if explicit is not None:
        return _explicit(recipe, explicit, nodes_wanted or 1, available)
    if any(offer.kind is not None for offer in available):
        found = best(recipe, available)
        if found is None:
            raise DoesNotFit(too_small(recipe, available))
        return _on_gpus(recipe, found, available)
    return _on_cpu(recipe, available)


def _blind(names: list[str], explicit: Resources | None, nodes: int) -> Decision:
    text = f"no estimate: the base model's {', '.join(names)} are not known; give them in spec.facts of the BaseModel"
    sizing = Sizing(
        source="spec" if explicit is not None else "default",
        gpus_per_node=explicit.gpus() if explicit is not None else 0,
        nodes=nodes,
        message=text,
    )
    return Decision(sizing, explicit, nodes)


def _on_gpus(recipe: Recipe, found: Fit, available: Sequence[NodeOffer]) -> Decision:
    kind, setup = found.kind, found.setup
    memory, space = host_memory(recipe, setup, found.gpus), disk(recipe, setup, found.gpus)
    shares = [offer.cpus / offer.gpus for offer in available if offer.kind == kind and offer.gpus >= found.gpus]
    # Less than a GPU's share of the node's CPUs, because DaemonSets use a part.
    cpus = max(1, min(CPUS_PER_GPU * found.gpus, int(0.9 * min(shares) * found.gpus)))
    resources = Resources(
        requests={"cpu": cpus, "memory": f"{memory // GIB}Gi", DISK: f"{space // GIB}Gi"},
        limits={"memory": f"{memory // GIB}Gi", GPU: found.gpus},
    )
    sizing = sizing_of(setup, found.items, kind, found.gpus, found.nodes, memory, space, "estimate")
    return Decision(sizing, resources, found.nodes, dict(kind.selector), _choice(setup))


def _on_cpu(recipe: Recipe, available: Sequence[NodeOffer]) -> Decision:
    shape = recipe.shape
    setup = recipe.setup(None, 0, 1, None)
    if not available:
        raise DoesNotFit(
            "no node of this cluster is Ready and matches the job's nodeSelector and tolerations; "
            "if nodes are added on demand, set spec.resources"
        )
    if shape.parameters > LARGEST_ON_CPU or setup is None:
        raise DoesNotFit(too_small(recipe, available))
    setup = _cpu_setup(recipe, setup)
    items = training_memory(shape, setup)
    memory = math.ceil(CPU_MARGIN * sum(items.values()) / STEP) * STEP
    roomy = [offer for offer in available if offer.memory >= memory]
    if not roomy:
        raise DoesNotFit(too_small(recipe, available))
    # Half of a node, because small clusters run other pods too. There is no CPU limit, so the training also uses idle
    # CPUs.
    cpus = max(1, min(MOST_CPUS, int(max(offer.cpus for offer in roomy) / 2)))
    text, space = f"{memory // 2**20}Mi", disk(recipe, setup, 0)
    resources = Resources(requests={"cpu": cpus, "memory": text, DISK: f"{space // GIB}Gi"}, limits={"memory": text})
    sizing = sizing_of(setup, items, None, 0, 1, memory, space, "estimate")
    return Decision(sizing, resources, 1, {}, _cpu_choice(setup))


def _cpu_setup(recipe: Recipe, setup: Setup) -> Setup:
    """Return the setup with the most memory that the trainer uses on a CPU: micro-batches of at most CPU_TOKENS."""
    fixed = recipe.training.per_device_train_batch_size
    size = fixed or max(1, min(16, CPU_TOKENS // recipe.length))
    return replace(setup, micro_batch=size, checkpointing=bool(recipe.training.gradient_checkpointing))


def _cpu_choice(setup: Setup) -> Choice:
    """Return the choice for a CPU. The trainer finds the micro-batch from the real lengths of the data."""
    return Choice(gradient_checkpointing=setup.checkpointing, sharding=setup.sharding)


def _choice(setup: Setup) -> Choice:
    return Choice(micro_batch=setup.micro_batch, gradient_checkpointing=setup.checkpointing, sharding=setup.sharding)


def _explicit(recipe: Recipe, explicit: Resources, nodes: int, available: Sequence[NodeOffer]) -> Decision:
    """Keep the spec's resources and estimate for them.

    If they look too small, the message warns; the job is never refused.
    """
    gpus = explicit.gpus()
    kinds = {offer.kind for offer in available if offer.kind is not None and offer.gpus >= gpus}
    kind = min(kinds, key=lambda item: (item.memory, item.product)) if gpus and kinds else None
    sharding = _sharding(recipe, gpus, nodes, kind)
    unseen = GpuKind("GPU", 0, bf16=True) if gpus else None
    setup = recipe.setup(kind or unseen, gpus, nodes, sharding)
    if setup is None:
        text = (
            f"{kind.product if kind else 'a CPU'} does not support spec.training.precision {recipe.training.precision}"
        )
        return Decision(Sizing(source="spec", gpus_per_node=gpus, nodes=nodes, message=text), explicit, nodes)
    limit = kind.memory if kind is not None else 0 if gpus else _memory(explicit)
    fitting = fit(recipe, setup, kind.usable) if kind is not None else None
    used = _cpu_setup(recipe, setup) if not gpus else fitting or smallest(recipe, setup)
    items = training_memory(recipe.shape, used)
    space = disk(recipe, used, gpus)
    sizing = sizing_of(used, items, kind, gpus, nodes, _memory(explicit) or None, space, "spec")
    if gpus and kind is None:
        sizing.message = (
            f"no node of this cluster offers {gpus} GPUs with a known memory size; "
            f"the estimate is {gib(sizing.total_bytes)} per GPU"
        )
    elif limit and sizing.total_bytes > limit:
        sizing.message = warning(recipe, setup, sizing.total_bytes, limit, kind)
    chosen = _choice(fitting) if fitting is not None else Choice(sharding=used.sharding)
    return Decision(sizing, explicit, nodes, {}, chosen)


def _sharding(recipe: Recipe, gpus: int, nodes: int, kind: GpuKind | None) -> Literal["ddp", "fsdp"] | None:
    """Return the spec's sharding; for `auto` fsdp if the method is full or the model fits only sharded, else ddp.

    None for one process.
    """
    if max(1, gpus) * nodes == 1:
        return None
    if recipe.training.sharding != "auto":
        return recipe.training.sharding
    if not sharded(recipe):
        return "ddp"
    whole = recipe.setup(kind, gpus, nodes, "ddp")
    crowded = kind is not None and whole is not None and fit(recipe, whole, kind.usable) is None
    return "fsdp" if recipe.method.full is not None or crowded else "ddp"


def _memory(resources: Resources) -> int:
    """Return the memory limit of the container in bytes, or else its request; 0 if it has neither."""
    found = (resources.limits or {}).get("memory") or (resources.requests or {}).get("memory") or 0
    return int(quantity(found))
