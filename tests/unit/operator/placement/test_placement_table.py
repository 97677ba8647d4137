"""The estimate reproduces the table of GPUs per model size that platform teams plan with.

The table leaves some settings open. These tests use Llama 2 with weights in bf16. Training is LoRA in bf16 (rank 16,
all linear layers), with 8 examples of up to 2048 tokens per GPU. Serving holds the weights in 8 bits, 4 adapters of
rank 16 and the cache of one request of 4096 tokens. The cluster offers every GPU of the table, so placement chooses.
"""

from typing import Any

import pytest
from graft.api.meta import Placement
from graft.api.quantity import quantity
from graft.api.recipe import Method, Training
from graft.placement import training
from graft.placement.blocks import geometry
from graft.placement.facts import facts_of
from graft.placement.offers import offers
from graft.placement.serving import Load, best_for_serving, serving_host_memory
from worlds.placement import LLAMA_2, gpu_node

CLUSTER = [
    gpu_node("t4", "Tesla-T4", 15360, gpus=4),
    gpu_node("a10", "NVIDIA-A10", 23028, gpus=4),
    gpu_node("a100-40", "NVIDIA-A100-SXM4-40GB", 40960, gpus=8),
    gpu_node("a100-80", "NVIDIA-A100-SXM4-80GB", 81920, gpus=8),
]
TABLE = [
    # model; training: GPU, count, maximum memory of the pod in bytes; serving: the same three
    ("7B", ("NVIDIA-A100-SXM4-40GB", 1, 64e9), ("Tesla-T4", 1, 32e9)),
    ("13B", ("NVIDIA-A100-SXM4-80GB", 1, 128e9), ("NVIDIA-A10", 1, 48e9)),
    ("70B", ("NVIDIA-A100-SXM4-80GB", 4, 512e9), ("NVIDIA-A100-SXM4-80GB", 1, 128e9)),
]


@pytest.mark.parametrize(("size", "expected"), [(size, row) for size, row, _ in TABLE], ids=["7B", "13B", "70B"])
def test_training_gets_the_gpus_of_the_table(size: str, expected: tuple[str, int, float]) -> None:
    gpu, count, memory = expected
    decision = training(
        facts_of(LLAMA_2[size]),
        Method.model_validate({"lora": {"rank": 16}}),
        Training.model_validate({"perDeviceTrainBatchSize": 8}),
        task="causal",
        nodes=CLUSTER,
        placement=Placement(),
    )
    assert (decision.sizing.gpu, decision.sizing.gpus_per_node, decision.nodes) == (gpu, count, 1)
    assert decision.node_selector == {"nvidia.com/gpu.product": gpu}
    assert decision.resources is not None and decision.resources.limits is not None
    assert decision.resources.gpus() == count
    assert quantity(decision.resources.limits["memory"]) <= memory
    assert decision.choice.sharding == ("fsdp" if count > 1 else None)


@pytest.mark.parametrize(("size", "expected"), [(size, row) for size, _, row in TABLE], ids=["7B", "13B", "70B"])
def test_serving_gets_the_gpus_of_the_table(size: str, expected: tuple[str, int, float]) -> None:
    gpu, count, memory = expected
    shape = geometry(facts_of(LLAMA_2[size]))
    load = Load(context=4096, quantization="int8", adapters=4, max_rank=16)
    found = best_for_serving(shape, load, offers(CLUSTER, Placement()))
    assert found is not None
    assert (found.kind.product, found.gpus) == (gpu, count)
    assert serving_host_memory(shape, load) <= memory


def test_the_estimate_is_itemised() -> None:
    decision = training(
        facts_of(LLAMA_2["7B"]),
        Method.model_validate({"lora": {"rank": 16}}),
        Training(),
        task="causal",
        nodes=CLUSTER,
        placement=Placement(),
    )
    sizing: dict[str, Any] = decision.sizing.wire()
    assert sizing["items"]["weights"] == 2 * 6_738_415_616
    assert sizing["items"]["adapter"] == 4 * 39_976_960  # the count by peft: rank 16, all linear layers of Llama-2-7B
    assert sizing["items"]["optimizer"] == 2 * sizing["items"]["adapter"]
    assert set(sizing["items"]) == {
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "framework",
    }
    assert sizing["totalBytes"] == sum(sizing["items"].values()) <= sizing["gpuMemoryBytes"]
