"""Placement of training jobs: the chosen hardware, the message if none fits, and the effect of explicit resources."""

from typing import Any

import pytest
from graft.api.basemodel import ModelFacts
from graft.api.meta import Placement, Resources
from graft.api.recipe import Method, Training
from graft.contracts.job import Choice
from graft.placement import Decision, DoesNotFit, training
from graft.placement.estimate import GIB
from graft.placement.facts import facts_of
from worlds.placement import LLAMA_2, TINY, gpu_node, node

A100 = gpu_node("a100", "NVIDIA-A100-SXM4-80GB", 81920, gpus=8)
L4 = gpu_node("l4", "NVIDIA-L4", 23034, gpus=2)
T4 = gpu_node("t4", "Tesla-T4", 15360, gpus=4)


def place(
    model: dict[str, Any] | ModelFacts | None,
    nodes: list[dict[str, Any]],
    method: str = "lora",
    placement: dict[str, Any] | None = None,
    resources: dict[str, Any] | None = None,
    nodes_wanted: int | None = None,
    spot_taints: tuple[str, ...] = (),
    longest: int | None = None,
    download: int = 0,
    **fields: Any,
) -> Decision:
    return training(
        facts_of(model) if isinstance(model, dict) else model,
        Method.model_validate({method: {}}),
        Training.model_validate(fields),
        task="causal",
        nodes=nodes,
        placement=Placement.model_validate(placement or {}),
        spot_taints=spot_taints,
        explicit=Resources.model_validate(resources) if resources else None,
        nodes_wanted=nodes_wanted,
        dataset_max_length=longest,
        download=download,
    )


def test_the_smallest_gpu_that_fits_wins() -> None:
    decision = place(LLAMA_2["7B"], [A100, L4, T4])
    assert decision.sizing.gpu == "NVIDIA-L4"
    assert decision.node_selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert decision.resources is not None
    assert decision.resources.wire() == {
        "requests": {"cpu": 4, "memory": "19Gi", "ephemeral-storage": "2Gi"},
        "limits": {"memory": "19Gi", "nvidia.com/gpu": 1},
    }
    assert decision.sizing.source == "estimate" and decision.sizing.node_memory_bytes == 19 * GIB


def test_the_disk_request_covers_base_model_checkpoint_and_published_files() -> None:
    size = 13_476_839_424  # bytes: two for each parameter
    lora = place(LLAMA_2["7B"], [A100], download=size)
    full = place(LLAMA_2["7B"], [A100], "full", download=size)
    mounted = place(LLAMA_2["7B"], [A100], "full")
    parameters = size // 2
    assert full.sizing.gpus_per_node > 1 and full.sizing.nodes == 1  # one pod holds all shards of a checkpoint
    for decision, needed in ((lora, size), (full, size + 12 * parameters + size), (mounted, 12 * parameters + size)):
        assert decision.resources is not None and decision.sizing.node_disk_bytes is not None
        assert needed < decision.sizing.node_disk_bytes < needed + 3 * GIB
        asked = (decision.resources.requests or {})["ephemeral-storage"]
        assert asked == f"{decision.sizing.node_disk_bytes // GIB}Gi"
    own = place(LLAMA_2["7B"], [A100], resources={"limits": {"nvidia.com/gpu": 1}})
    assert own.resources is not None and own.resources.requests is None  # explicit resources stay unchanged
    assert own.sizing.node_disk_bytes


def test_qlora_fits_where_lora_does_not() -> None:
    assert place(LLAMA_2["7B"], [A100, L4, T4], "qlora").sizing.gpu == "Tesla-T4"


def test_a_job_with_precision_bf16_gets_no_gpu_without_bf16() -> None:
    assert place(LLAMA_2["7B"], [A100, T4], "qlora", precision="bf16").sizing.gpu == "NVIDIA-A100-SXM4-80GB"


def test_one_gpu_is_preferred_to_several_and_one_node_to_two() -> None:
    one = place(LLAMA_2["7B"], [A100, L4], "lora")
    assert (one.sizing.gpus_per_node, one.nodes, one.choice.sharding) == (1, 1, None)
    several = place(LLAMA_2["7B"], [A100, L4], "full")
    assert (several.sizing.gpu, several.nodes, several.choice.sharding) == ("NVIDIA-A100-SXM4-80GB", 1, "fsdp")
    assert several.sizing.gpus_per_node == 2
    pairs = [gpu_node(name, "NVIDIA-A100-SXM4-80GB", 81920, gpus=2) for name in ("one", "two", "three", "four")]
    spread = place(LLAMA_2["13B"], pairs, "full")
    assert (spread.sizing.gpus_per_node, spread.nodes, spread.choice.sharding) == (2, 2, "fsdp")


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    """Gradient checkpointing is off if four examples fit without it. Otherwise it is on if more examples fit with it."""
    short = place(LLAMA_2["7B"], [A100], maxLength=512)
    assert (short.choice.micro_batch, short.choice.gradient_checkpointing) == (16, False)
    long = place(LLAMA_2["7B"], [L4], maxLength=2048)
    assert long.choice.gradient_checkpointing is True
    assert long.choice.micro_batch in {2, 4}
    assert long.sizing.micro_batch == long.choice.micro_batch


def test_batch_size_and_checkpointing_of_the_spec_are_kept() -> None:
    decision = place(LLAMA_2["7B"], [A100], perDeviceTrainBatchSize=3, gradientCheckpointing=True)
    assert decision.choice == Choice(micro_batch=3, gradient_checkpointing=True)
    plain = place(LLAMA_2["7B"], [A100, L4], gradientCheckpointing=False)
    assert (plain.sizing.gpu, plain.choice.gradient_checkpointing) == ("NVIDIA-A100-SXM4-80GB", False)
    halved = place(LLAMA_2["7B"], [A100], maxLength=512, gradientAccumulationSteps=4)
    assert halved.choice.micro_batch == 4


def test_short_examples_need_less_memory_than_the_maximum_length() -> None:
    known, unknown = (place(LLAMA_2["7B"], [A100], longest=longest).sizing for longest in (128, None))
    assert known.micro_batch == 16 and known.total_bytes < unknown.total_bytes


def test_nodes_that_the_job_cannot_run_on_are_ignored() -> None:
    taint = [{"key": "team", "value": "b", "effect": "NoSchedule"}]
    others = [
        gpu_node("tainted", "NVIDIA-L4", 23034, taints=taint),
        gpu_node("cordoned", "NVIDIA-L4", 23034, cordoned=True),
        gpu_node("down", "NVIDIA-L4", 23034, ready="Unknown"),
    ]
    assert place(LLAMA_2["7B"], [A100, *others]).sizing.gpu == "NVIDIA-A100-SXM4-80GB"
    tolerant = {"tolerations": [{"key": "team", "operator": "Equal", "value": "b"}]}
    assert place(LLAMA_2["7B"], [A100, *others], placement=tolerant).sizing.gpu == "NVIDIA-L4"
    picky = {"nodeSelector": {"kubernetes.io/hostname": "a100"}}
    assert place(LLAMA_2["7B"], [A100, L4], placement=picky).sizing.gpu == "NVIDIA-A100-SXM4-80GB"


def test_only_spot_jobs_use_spot_nodes_and_every_job_tolerates_the_gpu_taint() -> None:
    gke = "cloud.google.com/gke-spot"
    spot = gpu_node("spot", "NVIDIA-L4", 23034, taints=[{"key": gke, "value": "true", "effect": "NoSchedule"}])
    usual = gpu_node(
        "usual", "NVIDIA-A100-SXM4-80GB", 81920, taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    )
    assert place(LLAMA_2["7B"], [spot, usual]).sizing.gpu == "NVIDIA-A100-SXM4-80GB"
    assert place(LLAMA_2["7B"], [spot, usual], spot_taints=(gke,)).sizing.gpu == "NVIDIA-L4"


def test_if_nothing_fits_the_message_says_what_would() -> None:
    with pytest.raises(DoesNotFit) as refused:
        place(LLAMA_2["70B"], [A100, L4], "full")
    text = str(refused.value)
    assert text.startswith("full fine-tuning of 69.0 billion parameters needs 1")
    assert (
        "on each of 8 GPUs; the largest GPU of this cluster is NVIDIA-A100-SXM4-80GB with 80.0 GiB (1 node with up to 8 GPUs)"
        in text
    )
    assert "with spec.method.lora the job would fit on 4 x NVIDIA-A100-SXM4-80GB of this cluster" in text
    assert text.endswith(
        "the job would fit on 8 GPUs of 180 GB; otherwise lower spec.training.maxLength, or set spec.resources"
    )


def test_a_node_with_too_little_host_memory_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="needs more host memory than the nodes have"):
        place(LLAMA_2["7B"], [gpu_node("thin", "NVIDIA-A100-SXM4-80GB", 81920, memory="8Gi")])


def test_sharded_processes_hold_one_copy_of_the_weights_even_if_they_convert_them() -> None:
    same, other = (place(LLAMA_2["70B"] | {"torch_dtype": dtype}, [A100]).sizing for dtype in ("bfloat16", "float16"))
    assert (same.gpus_per_node, other.gpus_per_node, same.sharding) == (4, 4, "fsdp")
    assert same.node_memory_bytes == other.node_memory_bytes
    # 6 GiB for each process, one copy of the weights in 16 bits, and a checkpoint of the adapter.
    assert same.node_memory_bytes == pytest.approx(4 * 6 * GIB + 2 * 68_976_648_192, rel=0.05)


def test_a_small_model_runs_on_a_cpu_if_there_is_no_gpu() -> None:
    decision = place(TINY, [node("one", cpus="8", memory="16Gi"), node("two", cpus="2", memory="4Gi")])
    assert decision.resources is not None and decision.resources.limits is not None
    memory = decision.resources.limits["memory"]
    assert decision.resources.requests == {"cpu": 4, "memory": memory, "ephemeral-storage": "2Gi"}
    assert (decision.sizing.gpu, decision.sizing.gpus_per_node, decision.choice.micro_batch) == (None, 0, None)
    assert 1 * GIB < (decision.sizing.node_memory_bytes or 0) < 4 * GIB


def test_a_large_model_does_not_run_on_a_cpu() -> None:
    with pytest.raises(
        DoesNotFit,
        match=r"needs .* GiB of memory on a CPU, and a GPU to finish in reasonable time; no node that the job may run on has a GPU",
    ):
        place(LLAMA_2["7B"], [node("one", memory="2000Gi")])
    with pytest.raises(DoesNotFit, match=r"no node of this cluster is Ready and matches the job's nodeSelector"):
        place(TINY, [node("one", ready="False")])


def test_explicit_resources_stay_unchanged() -> None:
    given = {"requests": {"cpu": "3"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": 1}}
    decision = place(LLAMA_2["7B"], [A100], resources=given)
    assert decision.resources is not None and decision.resources.wire() == given
    assert (decision.sizing.source, decision.node_selector) == ("spec", {})
    assert decision.sizing.items["weights"] == 2 * 6_738_415_616
    assert decision.sizing.message is not None and "too small" not in decision.sizing.message
    assert decision.choice.micro_batch is not None


def test_explicit_resources_that_look_too_small_give_a_warning() -> None:
    gpu = {"limits": {"memory": "64Gi", "nvidia.com/gpu": 1}}
    message = place(LLAMA_2["70B"], [A100], resources=gpu).sizing.message or ""
    assert message.startswith("spec.resources look too small: the estimate is 14")
    assert "NVIDIA-A100-SXM4-80GB has 80.0 GiB" in message
    message = place(TINY, [node("one")], resources={"limits": {"memory": "512Mi"}}).sizing.message or ""
    assert "the memory limit is 0.5 GiB" in message


def test_explicit_gpus_shard_the_weights_if_one_gpu_cannot_hold_them() -> None:
    gpus = {"limits": {"memory": "200Gi", "nvidia.com/gpu": 4}}
    crowded = place(LLAMA_2["70B"], [A100], resources=gpus, nodes_wanted=2)
    assert (crowded.nodes, crowded.sizing.nodes, crowded.choice.sharding) == (2, 2, "fsdp")
    assert place(LLAMA_2["7B"], [A100], resources=gpus).choice.sharding == "ddp"
    assert place(LLAMA_2["7B"], [A100], "full", resources=gpus).choice.sharding == "fsdp"
    assert place(LLAMA_2["7B"], [A100], "qlora", resources=gpus).choice.sharding == "ddp"
    pods = {"limits": {"memory": "8Gi"}}
    assert place(TINY, [node("one")], resources=pods, nodes_wanted=2).choice.sharding == "ddp"


@pytest.mark.parametrize("optim", ["adafactor", "adamw8bit"])
def test_optimizers_that_cannot_be_sharded_get_one_gpu_or_full_copies(optim: str) -> None:
    large = gpu_node("h200", "NVIDIA-H200", 143771, gpus=8)
    one = place(LLAMA_2["7B"], [A100, large], "full", optim=optim)
    assert (one.sizing.gpus_per_node, one.nodes, one.choice.sharding) == (1, 1, None)
    with pytest.raises(DoesNotFit) as refused:
        place(LLAMA_2["13B"], [A100], "full", optim=optim)
    text = str(refused.value)
    assert "on one GPU; the largest GPU of this cluster is NVIDIA-A100-SXM4-80GB" in text
    assert (
        f"spec.training.optim {optim} cannot be sharded; with adamw the job would fit on 4 x NVIDIA-A100-SXM4-80GB"
        in text
    )
    gpus = {"limits": {"memory": "200Gi", "nvidia.com/gpu": 4}}
    assert place(LLAMA_2["7B"], [A100], "full", resources=gpus, optim=optim).choice.sharding == "ddp"
    assert place(LLAMA_2["70B"], [A100], resources=gpus, optim=optim).choice.sharding == "ddp"


def test_without_facts_there_is_no_estimate_and_the_remedy_is_named() -> None:
    decision = place(None, [A100])
    assert (decision.resources, decision.nodes, decision.sizing.items) == (None, 1, {})
    assert "parameters, layers, hiddenSize, vocabSize are not known; give them in spec.facts" in (
        decision.sizing.message or ""
    )
    given = {"limits": {"nvidia.com/gpu": 2}}
    kept = place(ModelFacts(parameters=7_000_000_000), [A100], resources=given, nodes_wanted=3)
    assert kept.resources is not None and kept.resources.wire() == given
    assert (kept.nodes, kept.sizing.source, kept.sizing.gpus_per_node) == (3, "spec", 2)
