"""The memory of an engine, and the smallest GPUs for it (PURE): weights, adapters, and the cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graft.api.recipe import Lora
from graft.placement.blocks import Geometry, adapter_parameters, linear_parameters
from graft.placement.estimate import CUDA_CONTEXT, GIB, MIB, NCCL, QUANT_BLOCK
from graft.placement.offers import GpuKind, NodeOffer

# The share of a GPU's memory that vLLM uses (its gpu_memory_utilization). The rest is for the driver and other
# processes.
SHARE = 0.9
ENGINE_PROCESS = 8 * GIB  # bytes of host memory of the engine, its CUDA libraries and its HTTP server
CPU_ENGINE = 1536 * MIB  # python with torch and transformers, and what malloc does not return to the system
BATCHED_TOKENS = 2048  # tokens that vLLM computes at once while it reads prompts; this sets the size of the activations
Quantization = Literal["none", "int8", "int4"]
WEIGHT_BYTES: dict[Quantization, float] = {"none": 2, "int8": 1, "int4": 0.5 + 4 / QUANT_BLOCK}


@dataclass(frozen=True)
class Load:
    """The load that an engine must hold in memory."""

    context: int  # tokens of the longest request
    concurrency: int = 1  # requests of that length at once
    quantization: Quantization = "none"
    adapters: int = 8  # slots for adapters, each large enough for max_rank
    max_rank: int = 64
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def width(self) -> int:
        """Bytes of a value that is not quantised."""
        return 2 if self.device == "cuda" else 4


@dataclass(frozen=True)
class ServingFit:
    """The GPUs of one replica. Several GPUs split the model by tensor parallelism."""

    kind: GpuKind
    gpus: int
    items: dict[str, int]  # bytes per GPU


def cache_bytes_per_token(shape: Geometry, width: int = 2) -> int:
    """Return the bytes of keys and values in all layers, per token (Pope et al. 2022, section 2.1)."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width


def weight_bytes(shape: Geometry, load: Load) -> int:
    """Return the bytes of the weights in memory. Only the blocks' linear layers are quantised."""
    linear = linear_parameters(shape)
    each = WEIGHT_BYTES[load.quantization] if load.quantization != "none" else float(load.width)
    return round(linear * each + (shape.parameters - linear) * load.width)


def serving_memory(shape: Geometry, load: Load, gpus: int = 1) -> dict[str, int]:
    """Return the bytes by purpose, of each of `gpus` GPUs, or of the process on a CPU, which computes in float32."""
    width = load.width
    slots = load.adapters * adapter_parameters(shape, Lora(rank=load.max_rank)) * width if load.adapters else 0
    cache = cache_bytes_per_token(shape, width) * load.context * load.concurrency
    tokens = min(BATCHED_TOKENS, load.context)
    activations = tokens * width * (4 * shape.hidden + 2 * shape.inner * shape.active_experts)
    logits = load.concurrency * 4 * shape.vocab * 2
    framework = CPU_ENGINE if load.device == "cpu" else CUDA_CONTEXT + (NCCL if gpus > 1 else 0)
    items = {
        "weights": weight_bytes(shape, load) / gpus,
        "adapters": slots / gpus,
        "cache": cache / min(gpus, shape.kv_heads),
        "activations": activations,
        "logits": logits,
        "framework": framework,
    }
    return {name: round(size) for name, size in items.items() if round(size) > 0}


def best_for_serving(shape: Geometry, load: Load, available: Sequence[NodeOffer], fewest: int = 1) -> ServingFit | None:
    """Return the fewest GPUs of one node (at least `fewest`) that hold the load, and among those the smallest, or None.

    Tensor parallelism splits the heads, so the number of heads must be a multiple of the number of GPUs.
    """
    kinds = {offer.kind for offer in available if offer.kind is not None}
    for gpus in (1, 2, 4, 8):
        for kind in sorted(kinds, key=lambda item: (item.memory, item.product)):
            most = 1 if kind.shared else max(offer.gpus for offer in available if offer.kind == kind)
            if gpus < fewest or gpus > most or shape.heads % gpus:
                continue
            items = serving_memory(shape, load, gpus)
            if sum(items.values()) <= SHARE * kind.memory:
                return ServingFit(kind, gpus, items)
    return None


def serving_host_memory(shape: Geometry, load: Load) -> int:
    """Return the bytes of host memory that the pod needs, in whole GiB: the weights once, while they are loaded, and
    the engine's process."""
    return -(-(weight_bytes(shape, load) + ENGINE_PROCESS) // GIB) * GIB


def strategy(memory: int) -> Literal["serverless", "dedicated", "distributed"]:
    """Return how an engine of this size (in bytes) runs: below 16 GB it may sleep while there are no requests, below 64
    GB it always runs, and from 64 GB on it is spread over several GPUs."""
    return "serverless" if memory < 16e9 else "dedicated" if memory < 64e9 else "distributed"
