"""The values that resolve derives for fields that the spec leaves open, and the settings that it refuses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graft.api.recipe import Lora
from graft.contracts.progress import EXIT_CODES, Reason
from graft.cpus import cpu_limit
from graft_trainer.loop.pace import Pace
from graft_trainer.model.targets import Projection, target_modules
from graft_trainer.recipe.resolve import Device, ModelFacts, Resolved, limits, resolve, steps_per_epoch
from graft_trainer.run.failures import Failure
from worlds.trainer import make_job

CPU = Device("cpu")
H100 = Device("cuda", bf16=True, free_bytes=80 * 2**30)
T4 = Device("cuda", bf16=False, free_bytes=15 * 2**30)
TINY = ModelFacts(context=512, layers=4, hidden_size=256, vocab_size=1536, parameters=4_000_000)
LLAMA_8B = ModelFacts(context=131072, layers=32, hidden_size=4096, vocab_size=128256, parameters=8_030_000_000)
LORA: dict[str, Any] = {"lora": {}}


def resolved(
    training: dict[str, Any] | None = None,
    device: Device = CPU,
    model: ModelFacts = TINY,
    method: dict[str, Any] = LORA,
    examples: int = 1000,
    longest: int = 64,
    held_out: bool = True,
    world: int = 1,
    halvings: int = 0,
    **changes: Any,
) -> Resolved:
    job = make_job(training=training or {}, method=method, **changes)
    known = limits(job, device, model.context, world)
    return resolve(
        job, known, device, model, examples=examples, longest=longest, held_out=held_out, world=world, halvings=halvings
    )


def test_defaults_on_a_cpu() -> None:
    wire = resolved().wire()
    assert wire == {
        "numTrainEpochs": 3.0,
        "maxSteps": 189,  # ceil(1000 / 16) x 3
        "learningRate": 2e-4,
        "perDeviceTrainBatchSize": 16,
        "gradientAccumulationSteps": 1,
        "worldSize": 1,
        "optim": "adamw",
        "adamBeta1": 0.9,
        "adamBeta2": 0.999,
        "adamEpsilon": 1e-08,
        "packing": False,
        "saveTotalLimit": 2,
        "lrSchedulerType": "cosine",
        "warmupSteps": 6,
        "weightDecay": 0.0,
        "maxGradNorm": 1.0,
        "maxLength": 512,
        "precision": "fp32",
        "gradientCheckpointing": False,
        "useLigerKernel": False,
        "loggingSteps": 10,
        "evalSteps": 63,
        "seed": 42,
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
    }


def test_fields_that_the_spec_sets_are_kept() -> None:
    got = resolved({"perDeviceTrainBatchSize": 32, "gradientAccumulationSteps": 3, "maxSteps": 400, "evalSteps": 50})
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == (32, 3)
    assert (got.max_steps, got.eval_steps) == (400, 50)
    assert got.num_train_epochs == pytest.approx(400 / 11, abs=1e-3)  # ceil(ceil(1000 / 32) / 3) steps per pass


@pytest.mark.parametrize(
    ("given", "batch", "accumulation"),
    [
        ({"gradientAccumulationSteps": 4}, 4, 4),
        ({"perDeviceTrainBatchSize": 4}, 4, 4),
        ({"perDeviceTrainBatchSize": 64}, 64, 1),
        ({"gradientAccumulationSteps": 32}, 1, 32),
    ],
)
def test_the_default_effective_batch_has_16_examples(given: dict[str, int], batch: int, accumulation: int) -> None:
    got = resolved(given)
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == (batch, accumulation)


def test_the_micro_batch_of_a_gpu_fits_beside_the_weights() -> None:
    long = resolved(device=H100, model=LLAMA_8B, longest=2048)
    short = resolved(device=H100, model=LLAMA_8B, longest=128)
    assert long.per_device_train_batch_size * long.gradient_accumulation_steps == 16
    assert 1 <= long.per_device_train_batch_size < short.per_device_train_batch_size == 16
    small = resolved(device=T4, model=LLAMA_8B, longest=2048)
    assert small.per_device_train_batch_size == 1


KNOWN = replace(LLAMA_8B, liger=True)


def test_fused_kernels_are_used_if_liger_supports_the_architecture() -> None:
    assert resolved(device=H100, model=KNOWN).use_liger_kernel
    assert not resolved(device=H100, model=LLAMA_8B).use_liger_kernel
    assert not resolved({"useLigerKernel": False}, device=H100, model=KNOWN).use_liger_kernel
    assert not resolved(device=H100, model=KNOWN, method={"full": {}}, world=8).use_liger_kernel, (
        "fused kernels are off by default for a sharded model"
    )
    assert resolved({"useLigerKernel": True}, device=H100, model=KNOWN, method={"full": {}}, world=8).use_liger_kernel


def test_fused_kernels_do_not_store_logits_so_more_examples_fit() -> None:
    without = resolved({"useLigerKernel": False}, device=H100, model=KNOWN, longest=1400)
    assert resolved(device=H100, model=KNOWN, longest=1400).per_device_train_batch_size > (
        without.per_device_train_batch_size
    )


@pytest.mark.parametrize(("device", "words"), [(CPU, "needs a GPU"), (H100, "no kernels for the base model")])
def test_unavailable_fused_kernels_are_refused(device: Device, words: str) -> None:
    with pytest.raises(Failure, match=words) as caught:
        resolved({"useLigerKernel": True}, device=device)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize(("device", "precision"), [(CPU, "fp32"), (H100, "bf16"), (T4, "fp16")])
def test_precision_follows_the_device(device: Device, precision: str) -> None:
    assert resolved(device=device).precision == precision


def test_qlora_computes_in_the_training_precision_unless_the_spec_sets_another() -> None:
    got = resolved(method={"qlora": {}}, device=H100)
    assert (got.quant_type, got.double_quant, got.compute_dtype) == ("nf4", True, "bfloat16")
    told = resolved(method={"qlora": {"computeDtype": "float16"}}, device=H100)
    assert told.compute_dtype == "float16"


@pytest.mark.parametrize(
    ("training", "device", "message"),
    [
        ({"precision": "fp16"}, CPU, "needs a GPU"),
        ({"precision": "bf16"}, T4, "this GPU does not support"),
        ({"maxLength": 1024}, CPU, "context is 512 tokens"),
    ],
)
def test_settings_that_the_device_or_model_does_not_support_are_refused(
    training: dict[str, Any], device: Device, message: str
) -> None:
    with pytest.raises(Failure, match=message) as caught:
        resolved(training, device)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID


def test_the_default_max_length_is_2048_for_a_long_or_unknown_context() -> None:
    assert resolved(model=LLAMA_8B).max_length == 2048
    assert limits(make_job(training={}), CPU, None).max_length == 2048


def test_without_held_out_examples_there_are_no_evaluation_steps() -> None:
    assert resolved(held_out=False).eval_steps is None


@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("lora", 2e-4), ("qlora", 2e-4), ("promptTuning", 3e-2)])
def test_the_learning_rate_follows_the_method(method: str, rate: float) -> None:
    assert resolved(method={method: {}}).learning_rate == rate
    assert resolved({"learningRate": 0.5}, method={method: {}}).learning_rate == 0.5


@pytest.mark.parametrize(
    ("method", "there"),
    [
        ("full", set()),
        ("lora", {"rank", "alpha", "dropout"}),
        ("qlora", {"rank", "alpha", "dropout", "quantType", "doubleQuant", "computeDtype"}),
        ("promptTuning", {"virtualTokens"}),
    ],
)
def test_a_method_has_its_own_fields_and_no_others(method: str, there: set[str]) -> None:
    own = {"rank", "alpha", "dropout", "quantType", "doubleQuant", "computeDtype", "virtualTokens"}
    assert own & resolved(method={method: {}}).wire().keys() == there


def test_virtual_tokens_reduce_the_default_max_length() -> None:
    method = {"promptTuning": {"virtualTokens": 100}}
    assert resolved(method=method).max_length == 412
    assert resolved(method=method, task="seq2seq").max_length == 412


@pytest.mark.parametrize(
    ("given", "world", "batch", "accumulation", "steps"),
    [
        ({}, 1, 16, 1, 63),
        ({}, 4, 4, 1, 63),  # 250 micro-batches, 63 for each process
        ({"perDeviceTrainBatchSize": 2}, 4, 2, 2, 63),
        ({"gradientAccumulationSteps": 2}, 4, 2, 2, 63),
        ({"perDeviceTrainBatchSize": 3}, 2, 3, 3, 56),  # 334 micro-batches, 167 for each process
        ({}, 32, 1, 1, 32),  # 32 processes need at least 32 examples per step
    ],
)
def test_processes_share_the_effective_batch(
    given: dict[str, int], world: int, batch: int, accumulation: int, steps: int
) -> None:
    got = resolved(given, world=world)
    assert (got.world_size, got.per_device_train_batch_size, got.gradient_accumulation_steps) == (
        world,
        batch,
        accumulation,
    )
    assert got.eval_steps == steps and got.max_steps == 3 * steps


@pytest.mark.parametrize(("examples", "batch", "accumulation"), [(1000, 3, 4), (17, 4, 2), (3, 8, 1), (64, 4, 4)])
def test_steps_per_epoch_are_those_of_accelerate(examples: int, batch: int, accumulation: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    for world in (1, 2, 3):
        for index in range(world):
            sampler = BatchSampler(range(examples), batch, drop_last=False)
            mine = len(list(BatchSamplerShard(sampler, world, index)))
            assert steps_per_epoch(examples, batch, accumulation, world) == math.ceil(mine / accumulation)


def test_placement_sets_the_fields_that_the_spec_leaves_open() -> None:
    choice = {"microBatch": 2, "gradientCheckpointing": True, "sharding": "fsdp"}
    got = resolved(device=H100, world=2, choice=choice)
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == (2, 4)
    assert got.gradient_checkpointing and got.sharding == "fsdp"
    told = {"perDeviceTrainBatchSize": 4, "gradientCheckpointing": False, "sharding": "ddp"}
    spec = resolved(told, device=H100, world=2, choice=choice)
    assert (spec.per_device_train_batch_size, spec.gradient_checkpointing, spec.sharding) == (4, False, "ddp")


@pytest.mark.parametrize(
    ("method", "world", "sharding"),
    [("full", 1, None), ("full", 2, "fsdp"), ("lora", 2, "ddp"), ("qlora", 2, "ddp"), ("promptTuning", 2, "ddp")],
)
def test_sharding_follows_the_method(method: str, world: int, sharding: str | None) -> None:
    assert resolved(method={method: {}}, world=world).sharding == sharding


def test_gradient_checkpointing_is_on_only_if_one_example_would_not_fit_without_it() -> None:
    assert not resolved(device=H100, model=LLAMA_8B, longest=2048).gradient_checkpointing
    long = {"maxLength": 65536}
    assert resolved(long, device=H100, model=LLAMA_8B, longest=65536).gradient_checkpointing
    assert not resolved(model=LLAMA_8B, longest=2048).gradient_checkpointing  # on a CPU


@pytest.mark.parametrize(
    ("batch", "accumulation", "halvings", "expected"),
    [
        (16, 1, 1, (8, 2)),
        (16, 1, 4, (1, 16)),
        (6, 2, 1, (3, 4)),
        (6, 2, 2, (1, 12)),
        (5, 4, 1, (2, 10)),
        (7, 1, 1, (1, 7)),
        (9, 1, 1, (3, 3)),
    ],
)
def test_halving_the_micro_batch_keeps_the_effective_batch(
    batch: int, accumulation: int, halvings: int, expected: tuple[int, int]
) -> None:
    given = {"perDeviceTrainBatchSize": batch, "gradientAccumulationSteps": accumulation}
    got = resolved(given, halvings=halvings)
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == expected
    assert expected[0] * expected[1] == batch * accumulation


def test_a_micro_batch_of_one_cannot_be_halved() -> None:
    with pytest.raises(Failure) as caught:
        resolved({"perDeviceTrainBatchSize": 4}, halvings=3)
    assert (caught.value.reason, EXIT_CODES[caught.value.reason]) == (Reason.OUT_OF_MEMORY, 18)
    assert "micro-batches of 1 example of up to 512 tokens (the first attempt had 4)" in caught.value.message
    assert (
        "training.maxLength (it is 512) to 256, set spec.training.gradientCheckpointing to true, use method qlora"
        in (caught.value.remedy)
    )
    with pytest.raises(Failure) as last:
        resolved({"gradientCheckpointing": True}, method={"qlora": {}}, halvings=9)
    assert "gradientCheckpointing" not in last.value.remedy and "qlora" not in last.value.remedy


@pytest.mark.parametrize("optim", ["adafactor", "adamw8bit"])
def test_optimizers_that_do_not_support_sharded_weights_are_refused_with_fsdp(optim: str) -> None:
    full: dict[str, Any] = {"full": {}}
    assert resolved({"optim": optim}, H100, method=full, world=2).sharding == "ddp"
    assert resolved({"optim": optim, "sharding": "fsdp"}, H100, method=full).sharding is None
    with pytest.raises(Failure) as caught:
        resolved({"optim": optim, "sharding": "fsdp"}, H100, method=full, world=2)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    assert f"training.optim is {optim}" in str(caught.value) and "adamw" in caught.value.remedy


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "adamw8bit"])
def test_an_8_bit_optimizer_needs_a_gpu(optim: str) -> None:
    assert resolved({"optim": optim}, H100).optim == optim
    if optim != "adamw8bit":
        assert resolved({"optim": optim}).optim == optim
        return
    with pytest.raises(Failure, match="needs a GPU") as caught:
        resolved({"optim": optim})
    assert caught.value.reason == Reason.CONFIGURATION_INVALID and "adafactor" in caught.value.remedy


def test_warmup_steps_are_set_by_the_spec_or_are_a_share_of_all_steps() -> None:
    assert resolved({"maxSteps": 100}).warmup_steps == 3
    assert resolved({"maxSteps": 100, "warmupSteps": 7}).warmup_steps == 7
    assert resolved({"maxSteps": 5, "warmupSteps": 7}).warmup_steps == 4
    assert resolved({"maxSteps": 1}).warmup_steps == 0
    assert resolved({"maxSteps": 100, "lrSchedulerType": "constant"}).warmup_steps == 0


LLAMA = [
    Projection(f"model.layers.{layer}.{name}", inputs, outputs)
    for layer in range(2)
    for name, inputs, outputs in [
        ("self_attn.q_proj", 64, 64),
        ("self_attn.k_proj", 64, 32),
        ("self_attn.v_proj", 64, 32),
        ("self_attn.o_proj", 64, 64),
        ("mlp.gate_proj", 64, 128),
        ("mlp.up_proj", 64, 128),
        ("mlp.down_proj", 128, 64),
    ]
]
GPT2 = [
    Projection(f"transformer.h.0.{name}", 64, 64) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
NEOX = [
    Projection(f"gpt_neox.layers.0.{name}", 64, 64)
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
OPT = [
    Projection(f"model.decoder.layers.0.{name}", 64, 64) for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1")
]
MIXTRAL = [Projection(f"model.layers.0.{name}", 64, 64) for name in ("self_attn.q_proj", "mlp.gate")]


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        (LLAMA, "attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (LLAMA, None, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (GPT2, "attention", ["attn.c_proj", "c_attn"]),
        (GPT2, "all-linear", ["c_attn", "c_fc", "c_proj"]),
        (NEOX, "attention", ["dense", "query_key_value"]),
        (OPT, "attention+mlp", ["fc1", "out_proj", "q_proj"]),
        (MIXTRAL, "all-linear", ["q_proj"]),
    ],
)
def test_presets_become_the_modules_of_the_architecture(
    model: list[Projection], preset: str | None, expected: list[str]
) -> None:
    assert target_modules(Lora.model_validate({"targetModules": preset}), model, []) == expected


def test_an_unknown_module_name_is_refused_with_a_list_of_the_known_names() -> None:
    with pytest.raises(Failure) as caught:
        target_modules(Lora(target_module_names=["q_proj", "qkv"]), LLAMA, [])
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    assert "no qkv; it has down_proj, gate_proj, k_proj" in caught.value.message


def test_a_rank_above_the_full_rank_is_refused() -> None:
    assert target_modules(Lora(rank=64), LLAMA, [])
    with pytest.raises(Failure, match="rank is 65"):
        target_modules(Lora(rank=65), LLAMA, [])


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trained(pace: Pace, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        pace.step(step, step * 100)


def test_pace_has_no_estimate_in_the_first_steps_and_includes_evaluations() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.step(0, 0)
    trained(pace, clock, range(1, 3), 2.0)
    assert pace.tokens_per_second() is None and pace.eta_seconds(20, 100) is None
    trained(pace, clock, range(3, 6), 2.0)
    clock.now += 7.0
    pace.evaluated(7.0)
    trained(pace, clock, range(6, 11), 2.0)
    assert pace.tokens_per_second() == 50.0
    assert pace.eta_seconds(20, 100) == 20
    assert pace.eta_seconds(20, 100, evaluations=2) == 34


def test_an_evaluation_counts_before_the_first_one_has_run() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.step(0, 0)
    trained(pace, clock, range(1, 2), 9.0)  # the first step is slow
    clock.now += 1.0
    pace.pause(1.0)
    pace.expect(12.0)
    trained(pace, clock, range(2, 6), 2.0)
    assert pace.eta_seconds(20, 100, evaluations=3) == 15 * 2 + 3 * 12
    clock.now += 10.0
    pace.evaluated(10.0)
    assert pace.eta_seconds(20, 100, evaluations=3) == 15 * 2 + 3 * 10  # what was measured replaces what was expected


def test_the_remaining_time_does_not_follow_every_pause_of_the_machine() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.step(0, 0)
    trained(pace, clock, range(1, 181), 1.0)
    trained(pace, clock, range(181, 201), 2.0)  # for 40 s, the machine is busy with something else
    assert pace.tokens_per_second() == 50.0
    assert pace.eta_seconds(1000, 100) == pytest.approx(800 * 120 / 100, rel=0.02)  # by the last 120 s


def test_steps_that_are_longer_than_the_rest_do_not_make_the_run_longer() -> None:
    # The tokens of the first 20 steps of `make test-real`. Counted in steps, the rest would take 2 % longer than it does.
    tokens = [299, 300, 292, 281, 307, 301, 299, 282, 268, 279, 278, 294, 286, 291, 302, 283, 282, 276, 271, 292]
    seconds = [0.1 + 0.0054 * count for count in tokens]
    clock = Clock()
    pace = Pace(clock)
    pace.step(0, 0)
    for step in range(1, 9):
        clock.now += seconds[step - 1]
        pace.step(step, sum(tokens[:step]))
    mean = sum(tokens) / len(tokens)
    assert pace.eta_seconds(1000, mean) == pytest.approx(992 * (0.1 + 0.0054 * mean), rel=0.01)


def test_a_long_run_keeps_few_marks() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.step(0, 0)
    trained(pace, clock, range(1, 100_001), 0.5)
    assert len(pace._marks) < 2000
    assert pace.tokens_per_second() == 200.0
    assert pace.eta_seconds(200_000, 100) == 50_000


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)])
def test_threads_follow_the_cpu_limit(tmp_path: Path, quota: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    unlimited = cpu_limit(tmp_path / "none")
    assert cpu_limit(tmp_path) == min(expected or unlimited, unlimited)
