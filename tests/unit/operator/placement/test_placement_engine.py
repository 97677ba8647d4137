"""Placement of serving replicas: GPUs, engine flags and the strategy."""

from typing import Any

import pytest
from graft.api import AdapterDeployment
from graft.api.adapterdeployment import AdapterDeploymentSpec
from graft.api.deploymentstatus import ServingSizing
from graft.placement.decide import DoesNotFit
from graft.placement.engine import basis_of, can_load, serving
from graft.placement.facts import facts_of
from worlds.placement import LLAMA_2, TINY, gpu_node, node

L4 = gpu_node("l4", "NVIDIA-L4", 23034, gpus=2)
A100 = gpu_node("a100", "NVIDIA-A100-SXM4-80GB", 81920, gpus=8)
T4 = gpu_node("t4", "Tesla-T4", 15360)
CPU = node("cpu")


def spec(**fields: Any) -> AdapterDeploymentSpec:
    full = {"baseModel": "m", "adapters": ["support@latest"]} | fields
    return AdapterDeployment.model_validate({"metadata": {"name": "chat"}, "spec": full}).spec


def place(
    model: str, *nodes: dict[str, Any], task: Any = "causal", vllm: bool = True, int4: bool = True, **fields: Any
) -> ServingSizing:
    config = TINY if model == "tiny" else LLAMA_2[model]
    return serving(facts_of(config), spec(**fields), task=task, nodes=nodes, vllm=vllm, int4=int4)


def test_the_smallest_gpu_that_fits_is_chosen() -> None:
    found = place("7B", L4, A100, CPU, limits={"maxLoraRank": 16})
    assert (found.engine, found.gpu, found.gpus, found.quantization) == ("vllm", "NVIDIA-L4", 1, "none")
    assert found.node_selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert found.total_bytes == sum(found.items.values()) <= 0.9 * 23034 * 2**20
    assert found.max_model_len == 4096 and 1 <= (found.max_num_seqs or 0) <= 256
    assert found.strategy == "dedicated" and "dedicated" in (found.message or "")


def test_a_large_model_is_spread_by_tensor_parallelism() -> None:
    found = place("70B", L4, A100, quantization="none")
    assert (found.gpu, found.gpus, found.strategy) == ("NVIDIA-A100-SXM4-80GB", 4, "distributed")
    assert place("7B", A100, strategy="distributed").gpus == 2


def test_the_strategy_follows_from_the_memory() -> None:
    small = {"limits": {"maxLoras": 2, "maxLoraRank": 8, "maxModelLen": 2048}}
    assert place("7B", L4, quantization="int4", **small).strategy == "serverless"
    assert place("70B", A100, quantization="int4", **small).strategy == "dedicated"
    forced = place("7B", L4, strategy="serverless", autoscaling={"minReplicas": 0, "maxReplicas": 1}, **small)
    assert forced.strategy == "serverless"


def test_the_model_is_quantized_only_if_nothing_else_fits() -> None:
    assert place("7B", T4).quantization == "int4"
    assert place("7B", T4).dtype == "float16"  # GPUs before Ampere have no bfloat16
    with pytest.raises(DoesNotFit, match=r"spec\.quantization int4 would fit"):
        place("7B", T4, quantization="none")


def test_without_bitsandbytes_in_the_image_4_bits_are_neither_chosen_nor_accepted_on_gpus() -> None:
    """The shipped image of vLLM cannot load them: the pods would end again and again."""
    with pytest.raises(DoesNotFit, match=r"7 billion parameters in 16 bits.*spec\.quantization int8 would fit"):
        place("7B", T4, int4=False)
    explicit = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    for given in ({}, {"engine": "vllm"}, explicit):
        with pytest.raises(DoesNotFit, match=r"serving\.vllmInt4"):
            place("7B", L4, int4=False, quantization="int4", **given)
    with pytest.raises(DoesNotFit, match=r"serving\.vllmInt4"):
        serving(None, spec(quantization="int4", **explicit), task="causal", nodes=[L4], vllm=True)
    assert place("tiny", CPU, int4=False, quantization="int4").quantization == "int4"
    before = place("7B", T4)
    assert can_load(before, int4=True) and not can_load(before, int4=False)


def test_the_context_is_shortened_before_the_weights_are_quantized() -> None:
    long = facts_of(LLAMA_2["7B"] | {"max_position_embeddings": 131072})
    found = serving(long, spec(limits={"maxLoraRank": 16}), task="causal", nodes=[L4], vllm=True)
    assert found.quantization == "none" and found.max_model_len is not None and 2048 <= found.max_model_len < 131072
    assert "reduced from the model's 131072" in (found.message or "")
    with pytest.raises(DoesNotFit):
        serving(long, spec(limits={"maxModelLen": 131072}), task="causal", nodes=[L4], vllm=True)


def test_if_nothing_fits_the_message_says_what_would() -> None:
    with pytest.raises(DoesNotFit) as refused:
        place("70B", L4)
    text = str(refused.value)
    assert "GiB" in text and "NVIDIA-L4" in text and "it would fit on" in text and "spec.resources" in text
    with pytest.raises(DoesNotFit, match="no node that the deployment may run on offers a GPU"):
        place("7B", CPU, engine="vllm")


def test_without_gpus_small_models_are_served_on_a_cpu() -> None:
    found = place("tiny", CPU)
    assert (found.engine, found.gpus, found.memory_bytes, found.source) == ("transformers", 0, None, "default")
    assert found.strategy == "serverless"
    with pytest.raises(DoesNotFit, match=r"spec\.resources"):
        place("7B", CPU)
    with pytest.raises(DoesNotFit, match="int8"):
        place("tiny", CPU, quantization="int8")
    assert place("tiny", CPU, quantization="int4").quantization == "int4"


def test_vllm_is_chosen_only_if_it_can_serve_the_model() -> None:
    assert place("tiny", L4).engine == "vllm"
    assert place("tiny", L4, vllm=False).engine == "transformers"
    assert place("tiny", L4, task="seq2seq").engine == "transformers"
    assert place("tiny", L4, engine="transformers").engine == "transformers"


def test_explicit_resources_stay_unchanged() -> None:
    given = {"limits": {"nvidia.com/gpu": 2, "memory": "32Gi"}}
    found = place("7B", L4, A100, resources=given)
    assert (found.engine, found.gpus, found.source, found.max_num_seqs) == ("vllm", 2, "spec", None)
    small = place("70B", L4, resources=given)
    assert "look too small" in (small.message or "")
    assert place("tiny", L4, resources={"limits": {"memory": "8Gi"}}).engine == "transformers"


def test_without_facts_there_is_no_strategy_and_the_message_names_spec_facts() -> None:
    found = serving(None, spec(), task="causal", nodes=[L4], vllm=True)
    assert found.engine == "transformers" and found.strategy is None and "spec.facts" in (found.message or "")


def test_a_replica_takes_only_its_share_of_a_time_sliced_gpu() -> None:
    sliced = gpu_node("s", "NVIDIA-A100-SXM4-80GB-SHARED", 81920, gpus=4, labels={"nvidia.com/gpu.replicas": "2"})
    assert place("7B", sliced).gpu_memory_percent == 45


def test_the_basis_holds_only_the_fields_that_decide_the_placement() -> None:
    facts = facts_of(LLAMA_2["7B"])

    def basis(**fields: Any) -> str:
        return basis_of(facts, spec(**fields), task="causal", vllm=True)

    same = basis()
    assert basis(adapters=["support@latest", "mail@latest"], replicas=3) == same
    assert basis(autoscaling={"maxReplicas": 3, "target": {"cpuPercent": 50}}) == same
    assert basis(limits={"maxLoras": 4}) != same and basis(quantization="int4") != same
    assert basis(resources={}) != same  # GPUs that were chosen without resources do not stay
    assert basis_of(facts_of(LLAMA_2["13B"]), spec(), task="causal", vllm=True) != same
