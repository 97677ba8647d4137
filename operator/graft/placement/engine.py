"""The placement of an engine (PURE): GPUs, quantisation, length and batch of a replica, its pod's resources, and
status.sizing.

A choice is kept as long as its inputs (`basis`) are the same. So nodes that come and go never roll the serving pods.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from graft.api.adapterdeployment import AdapterDeploymentSpec
from graft.api.basemodel import ModelFacts
from graft.api.deploymentstatus import ServingSizing
from graft.placement.blocks import FactsMissing, Geometry, geometry
from graft.placement.choose import CPUS_PER_GPU, MARKET
from graft.placement.decide import DoesNotFit
from graft.placement.estimate import GIB
from graft.placement.explain import gib
from graft.placement.offers import GpuKind, Node, NodeOffer, offers
from graft.placement.serving import (
    SHARE,
    Load,
    Quantization,
    ServingFit,
    best_for_serving,
    serving_host_memory,
    serving_memory,
    strategy,
)

DEFAULT_MAX_LORAS = 8
UNKNOWN_CONTEXT = 4096  # tokens; for models whose facts name no context length
SHORTEST_CONTEXT = 2048  # tokens; placement does not shorten the model's own length below this
TYPICAL_TOKENS = 1024  # tokens of a request, to derive the batch from the size of the cache
CPU_MEMORY = 4 * GIB  # bytes; the API's default for a pod without resources
MOST_SEQUENCES = 256  # requests at once; vLLM's default
NO_INT4 = (
    "the image of vLLM of this installation cannot load 4-bit weights: set spec.quantization to none or int8, or ask your "
    "platform team for an image with the package vllm-bnb-plugin and the chart's value serving.vllmInt4"
)
Engine = Literal["vllm", "transformers"]
Task = Literal["causal", "seq2seq"]


def serving(
    facts: ModelFacts | None,
    spec: AdapterDeploymentSpec,
    *,
    task: Task,
    nodes: Iterable[Node],
    vllm: bool,
    int4: bool = False,
) -> ServingSizing:
    """Place one replica.

    nodes: Node objects of the Kubernetes API. vllm: whether this installation has an image of vLLM; vLLM serves no
    seq2seq models. int4: whether that image can load 4-bit weights. Raises DoesNotFit if the replica does not fit on the
    cluster, or if the image cannot load it.
    """
    basis = basis_of(facts, spec, task=task, vllm=vllm)
    try:
        shape = geometry(facts or ModelFacts())
    except FactsMissing as missing:
        return _loadable(_blind(missing.names, spec, basis), int4=int4)
    if spec.resources is not None:
        return _loadable(_explicit(shape, facts, spec, offers(nodes, spec), basis), int4=int4)
    available = offers(nodes, spec)
    gpus = any(offer.kind is not None for offer in available)
    if spec.engine == "vllm" or (spec.engine == "auto" and gpus and vllm and task == "causal"):
        return _on_gpus(shape, facts, spec, available, basis, int4=int4)
    return _on_cpu(shape, facts, spec, basis)


def can_load(sizing: ServingSizing, *, int4: bool) -> bool:
    """Return whether the engine of a choice can load its weights. `int4`: see `serving`."""
    return int4 or sizing.engine != "vllm" or sizing.quantization != "int4"


def _loadable(sizing: ServingSizing, *, int4: bool) -> ServingSizing:
    if not can_load(sizing, int4=int4):
        raise DoesNotFit(NO_INT4)
    return sizing


def basis_of(facts: ModelFacts | None, spec: AdapterDeploymentSpec, *, task: Task, vllm: bool) -> str:
    """Return a digest of a choice's inputs, without the nodes.

    It excludes adapters, routes and replicas: they never roll the pods.
    """
    # Empty resources are the user's choice, unlike absent ones. The digests of all other specs stay what they were.
    resources = {} if spec.resources is None else spec.resources.wire() or "empty"
    limits = spec.limits.model_copy(update={"adapters_per_replica": None, "adapter_bytes_per_replica": None})
    parts = [
        facts.wire() if facts is not None else {}, limits.wire(), spec.engine, spec.strategy, spec.quantization,
        spec.node_selector or {}, [item.wire() for item in spec.tolerations or []],
        resources, task, vllm,
    ]  # fmt: skip
    return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _explicit_engine(spec: AdapterDeploymentSpec) -> Engine:
    if spec.engine != "auto":
        return spec.engine
    return "vllm" if spec.resources is not None and spec.resources.gpus() > 0 else "transformers"


def _asked(spec: AdapterDeploymentSpec) -> Quantization:
    return "none" if spec.quantization == "auto" else spec.quantization


def _load(spec: AdapterDeploymentSpec, context: int, quantization: Quantization) -> Load:
    return Load(
        context=context,
        quantization=quantization,
        adapters=spec.limits.max_loras or DEFAULT_MAX_LORAS,
        max_rank=spec.limits.max_lora_rank,
    )


def _blind(names: list[str], spec: AdapterDeploymentSpec, basis: str) -> ServingSizing:
    """Return the spec's choice for a model without facts. Without spec.resources, it has no GPU."""
    text = f"no estimate: the base model's {', '.join(names)} are not known; give them in spec.facts of the BaseModel"
    return ServingSizing(
        engine=_explicit_engine(spec),
        gpus=spec.resources.gpus() if spec.resources is not None else 0,
        strategy=None if spec.strategy == "auto" else spec.strategy,
        quantization=_asked(spec),
        max_model_len=spec.limits.max_model_len,
        max_num_seqs=spec.limits.max_num_seqs,
        source="spec" if spec.resources is not None else "default",
        basis=basis,
        message=text,
    )


def _contexts(facts: ModelFacts | None, spec: AdapterDeploymentSpec) -> Iterator[int]:
    """Yield the spec's length.

    Without one, yield the model's own length, then halves of it down to SHORTEST_CONTEXT.
    """
    if spec.limits.max_model_len is not None:
        yield spec.limits.max_model_len
        return
    length = (facts.context_length if facts is not None else None) or UNKNOWN_CONTEXT
    while True:
        yield length
        if length // 2 < SHORTEST_CONTEXT:
            return
        length //= 2


def _chosen_strategy(spec: AdapterDeploymentSpec, memory: int) -> str:
    return strategy(memory) if spec.strategy == "auto" else spec.strategy


def _on_gpus(
    shape: Geometry,
    facts: ModelFacts | None,
    spec: AdapterDeploymentSpec,
    available: Sequence[NodeOffer],
    basis: str,
    *,
    int4: bool,
) -> ServingSizing:
    if spec.quantization == "int4" and not int4:
        raise DoesNotFit(NO_INT4)
    tried: list[Quantization] = ["none", "int4"] if spec.quantization == "auto" and int4 else [_asked(spec)]
    own = next(_contexts(facts, spec))
    for quantization in tried:
        for context in _contexts(facts, spec):
            load = _load(spec, context, quantization)
            fewest = 2 if spec.strategy == "distributed" else 1
            fit = best_for_serving(shape, load, available, fewest=fewest)
            if fit is not None:
                return _chosen(shape, spec, load, fit, available, own, basis)
    raise DoesNotFit(_too_small(shape, facts, spec, available, int4=int4))


def _chosen(
    shape: Geometry,
    spec: AdapterDeploymentSpec,
    load: Load,
    fit: ServingFit,
    available: Sequence[NodeOffer],
    own: int,
    basis: str,
) -> ServingSizing:
    kind = fit.kind
    total = sum(fit.items.values())
    sequences = spec.limits.max_num_seqs or _sequences(load, fit)
    shares = [offer.cpus / offer.gpus for offer in available if offer.kind == kind and offer.gpus >= fit.gpus]
    cut = f", reduced from the model's {own}, which does not fit on this cluster" if load.context < own else ""
    how = f"weights in {WORDS[load.quantization]}, {load.context} tokens{cut}, {load.adapters} adapters of rank {load.max_rank}"
    each = " each" if fit.gpus > 1 else ""
    chosen = _chosen_strategy(spec, sum(serving_memory(shape, load).values()))
    return ServingSizing(
        items=fit.items,
        total_bytes=total,
        strategy=chosen,
        engine="vllm",
        gpu=kind.product,
        gpu_memory_bytes=kind.memory,
        gpus=fit.gpus,
        # Less than a GPU's share of the node's CPUs, because DaemonSets use a part.
        cpus=max(1, min(CPUS_PER_GPU * fit.gpus, int(0.9 * min(shares) * fit.gpus))),
        memory_bytes=_host_memory(shape, load, fit),
        node_selector=dict(kind.selector) or None,
        quantization=load.quantization,
        dtype=None if kind.bf16 else "float16",
        max_model_len=load.context,
        max_num_seqs=sequences,
        gpu_memory_percent=int(100 * SHARE) // kind.shares,
        source="estimate",
        basis=basis,
        message=f"{fit.gpus} x {kind.product}: {gib(total)} of {gib(kind.memory)}{each} ({how}), {chosen}",
    )


WORDS = {"none": "16 bits", "int8": "8 bits", "int4": "4 bits"}


def _host_memory(shape: Geometry, load: Load, fit: ServingFit) -> int:
    """Return the bytes of host memory, in whole GiB. They hold as many adapters as the GPUs have slots."""
    return -(-(serving_host_memory(shape, load) + fit.items.get("adapters", 0) * fit.gpus) // GIB) * GIB


def _sequences(load: Load, fit: ServingFit) -> int:
    """Return how many requests of TYPICAL_TOKENS the cache holds at once in the remaining GPU memory."""
    left = SHARE * fit.kind.memory - sum(fit.items.values()) + fit.items["cache"]
    tokens = left / (fit.items["cache"] / load.context)
    return max(1, min(MOST_SEQUENCES, int(tokens / min(load.context, TYPICAL_TOKENS))))


def _on_cpu(shape: Geometry, facts: ModelFacts | None, spec: AdapterDeploymentSpec, basis: str) -> ServingSizing:
    """Place the CPU engine with the API's default resources. It is for small models and development."""
    quantization = _cpu_quantization(spec)
    load = replace(_load(spec, next(_contexts(facts, spec)), quantization), device="cpu")
    items = serving_memory(shape, load)
    total = sum(items.values())
    if items["weights"] + items["framework"] > CPU_MEMORY:
        raise DoesNotFit(
            f"serving {shape.parameters / 1e9:.1f} billion parameters on a CPU needs {gib(total)}, and a pod without spec.resources "
            f"has {gib(CPU_MEMORY)}; set spec.resources, or add a node with a GPU"
        )
    chosen = _chosen_strategy(spec, total)
    return ServingSizing(
        items=items,
        total_bytes=total,
        strategy=chosen,
        engine="transformers",
        quantization=quantization,
        max_model_len=spec.limits.max_model_len,
        max_num_seqs=spec.limits.max_num_seqs,
        source="default",
        basis=basis,
        message=f"CPU: {gib(total)} ({load.context} tokens), {chosen}; the pod has 4Gi of memory, set spec.resources for more",
    )


def _cpu_quantization(spec: AdapterDeploymentSpec) -> Quantization:
    if spec.quantization == "int8":
        raise DoesNotFit(
            "the engine transformers does not support int8: set spec.quantization to none or int4, or use GPUs with vllm"
        )
    return _asked(spec)


def _explicit(
    shape: Geometry,
    facts: ModelFacts | None,
    spec: AdapterDeploymentSpec,
    available: Sequence[NodeOffer],
    basis: str,
) -> ServingSizing:
    """Keep the spec's resources and estimate for them. If they look too small, the message warns; it never refuses."""
    assert spec.resources is not None  # noqa: S101
    gpus, engine = spec.resources.gpus(), _explicit_engine(spec)
    quantization = _cpu_quantization(spec) if engine == "transformers" else _asked(spec)
    load = _load(spec, next(_contexts(facts, spec)), quantization)
    if not gpus:
        load = replace(load, device="cpu")
    kinds = {offer.kind for offer in available if offer.kind is not None and offer.gpus >= gpus}
    kind = min(kinds, key=lambda item: (item.memory, item.product)) if gpus and kinds else None
    items = serving_memory(shape, load, max(1, gpus))
    total = sum(items.values())
    chosen = _chosen_strategy(spec, sum(serving_memory(shape, load).values()))
    text = f"{kind.product if kind else f'{gpus} GPUs' if gpus else 'CPU'}: {gib(total)}{' each' if gpus > 1 else ''}, {chosen}"
    if kind is not None and total > SHARE * kind.memory:
        text = f"spec.resources look too small: the estimate is {gib(total)}, {kind.product} has {gib(kind.memory)}"
    return ServingSizing(
        items=items,
        total_bytes=total,
        strategy=chosen,
        engine=engine,
        gpu=kind.product if kind is not None else None,
        gpu_memory_bytes=kind.memory if kind is not None else None,
        gpus=gpus,
        quantization=quantization,
        dtype="float16" if kind is not None and not kind.bf16 else None,
        max_model_len=spec.limits.max_model_len,
        max_num_seqs=spec.limits.max_num_seqs,
        gpu_memory_percent=int(100 * SHARE) if engine == "vllm" else None,
        source="spec",
        basis=basis,
        message=text,
    )


def _too_small(
    shape: Geometry,
    facts: ModelFacts | None,
    spec: AdapterDeploymentSpec,
    available: Sequence[NodeOffer],
    *,
    int4: bool,
) -> str:
    """Return a text about what is needed, what the cluster has, and what would fit."""
    *_, context = _contexts(facts, spec)
    lightest: Quantization = "int4" if int4 else "int8"
    quantization: Quantization = "int4" if spec.quantization == "auto" and int4 else _asked(spec)
    load = _load(spec, context, quantization)
    size = f"serving {shape.parameters / 1e9:.1f} billion parameters in {WORDS[quantization]}"
    needed = gib(sum(serving_memory(shape, load).values()))
    kinds = {offer.kind for offer in available if offer.kind is not None}
    if not kinds:
        has = "no node that the deployment may run on offers a GPU"
    else:
        kind = max(kinds, key=lambda item: (item.memory, item.product))
        most = max(offer.gpus for offer in available if offer.kind == kind)
        has = f"the largest GPU of this cluster is {kind.product} with {gib(kind.memory)} (up to {most} per node)"
    lighter = best_for_serving(shape, replace(load, quantization=lightest), available)
    ways = [f"spec.quantization {lightest} would fit on this cluster"] if lighter is not None else []
    market = _market(shape, load)
    ways += [market] if market else []
    ways.append("otherwise lower maxLoras, maxLoraRank or maxModelLen in spec.limits, or set spec.resources")
    return f"{size}, {context} tokens and {load.adapters} adapters needs {needed} on one GPU; {has}; {'; '.join(ways)}"


def _market(shape: Geometry, load: Load) -> str | None:
    """Return a text about the smallest GPUs on the market that would fit, or None."""
    for gpus in (1, 2, 4, 8):
        for gigabytes, shown in MARKET.items():
            kind = GpuKind("GPU", int(shown * GIB), bf16=True)
            if best_for_serving(shape, load, [NodeOffer("", 1, 0, gpus, kind)], fewest=gpus) is not None:
                return f"it would fit on {gpus} GPU{'s' if gpus > 1 else ''} of {gigabytes} GB"
    return None
