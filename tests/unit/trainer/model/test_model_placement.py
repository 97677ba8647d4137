"""After training, the model is placed where it fits in memory. The placement changes no metrics and no files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from graft_trainer import train as train_module
from graft_trainer.evaluation.evaluate import Evaluated, evaluate
from graft_trainer.model import model_placement
from graft_trainer.model.model_placement import place, plan, release, weight_bytes
from graft_trainer.versions.publish import publish
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from worlds.trainer import MemoryStore, make_base, make_job, make_t5, question_lines, ready, train_prepared


@pytest.mark.parametrize(
    ("free", "gpus"),
    [
        ([1.3], {0}),
        ([1.2], set()),
        ([0.4, 1.3], {1}),
        ([0.9, 0.9], {0, 1}),
        ([0.4, 0.4, 0.4, 0.4, 0.4], {0, 1, 2, 3, 4}),
        ([0.6, 0.6], set()),
        ([0.1] * 16, set()),  # the sum is large enough, but no block fits on one GPU
        ([], set()),
    ],
)
def test_one_gpu_is_preferred_to_several_and_several_to_host_memory(free: list[float], gpus: set[int]) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=8)
    model = LlamaForCausalLM(config)
    planned = plan(model, [int(share * weight_bytes(model)) for share in free])
    assert set(planned.values()) == gpus
    assert len(gpus) < 2 or {f"model.layers.{layer}" for layer in range(8)} < planned.keys()


class Pod:
    """Simulated GPUs. Modules that are placed on them stay in host memory, but get accelerate's hooks."""

    def __init__(self, patch: pytest.MonkeyPatch, free: list[int]) -> None:
        self.looks: list[list[int]] = [free]
        self.moved: list[Any] = []
        patch.setattr(model_placement, "_gpus", lambda: len(free))
        patch.setattr(model_placement, "_free_memory", self.free)
        patch.setattr(model_placement, "_to", lambda model, gpu: self.moved.append(gpu))
        patch.setattr(model_placement, "_dispatch", self.dispatch)
        patch.setattr(model_placement, "LOOK", 0.0)

    def free(self, gpus: int) -> list[int]:
        look = self.looks[0] if len(self.looks) == 1 else self.looks.pop(0)
        return look[:gpus]

    def dispatch(self, model: Any, spread: dict[str, int]) -> None:
        self.moved.append(spread)
        on_cpu = dict.fromkeys(spread, "cpu")
        skip = model._skip_keys_device_placement
        dispatch_model(model, device_map=on_cpu, main_device="cpu", skip_keys=skip, force_hooks=True)
        model.hf_device_map = spread


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"causal": make_base(tmp_path_factory.mktemp("llama")), "seq2seq": make_t5(tmp_path_factory.mktemp("t5"))}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def test_a_model_that_fits_on_its_gpu_is_placed_there(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(bases["causal"])
    pod = Pod(monkeypatch, [weight_bytes(model) * 2, 0])
    place(model)
    assert pod.moved == [0]


def test_a_model_is_spread_by_whole_blocks_after_the_other_ranks_have_ended(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(bases["causal"])
    free = [int(1.1 * weight_bytes(model))] * 2
    pod = Pod(monkeypatch, free)
    pod.looks = [free, [free[0], 0], [free[0], 0], free]
    place(model)
    (spread,) = pod.moved
    assert set(spread.values()) == {0, 1}
    assert {"model.layers.0", "model.layers.1"} <= spread.keys() and spread["model.embed_tokens"] == 0


def test_a_model_that_does_not_fit_on_the_gpus_stays_in_host_memory(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(bases["causal"])
    monkeypatch.setattr(model_placement, "ENDING", 0.0)
    pod = Pod(monkeypatch, [weight_bytes(model) // 4] * 2)
    with caplog.at_level(logging.WARNING):
        place(model)
    assert pod.moved == [] and model.device.type == "cpu"
    assert "stays in host memory" in caplog.text


def test_out_of_memory_during_the_placement_leaves_the_model_unchanged(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(bases["causal"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pod = Pod(monkeypatch, [int(1.1 * weight_bytes(model))] * 2)

    def fail(model: Any, spread: dict[str, int]) -> None:
        pod.dispatch(model, spread)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_placement, "_dispatch", fail)
    place(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_release_frees_the_weights_of_a_model_that_is_still_referenced(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(bases["causal"])
    Pod(monkeypatch, [int(1.1 * weight_bytes(model))] * 2)
    place(model)
    release(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("causal", {"full": {}}),
        ("causal", {"lora": {"rank": 4}}),
        ("causal", {"promptTuning": {"virtualTokens": 4}}),
        ("seq2seq", {"lora": {"rank": 4, "targetModules": "all-linear+embeddings"}}),
    ],
)
def test_a_model_on_several_gpus_has_the_same_metrics_and_files_as_on_one_device(
    bases: dict[str, Path], tmp_path: Path, task: str, method: dict[str, Any]
) -> None:
    found = []
    for spread in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "cpu_limit", lambda: 1)
            pod = Pod(patch, [300_000 if task == "causal" else 700_000] * 3 if spread else [])
            data = {"team-a/data/train.jsonl": question_lines(24), "team-a/data/eval.jsonl": question_lines(6)}
            files = {role: {"uri": f"s3://bucket/team-a/data/{role}.jsonl"} for role in ("train", "eval")}
            job = make_job(task=task, method=method, dataset=files | {"format": "instruction"})
            run, _ = ready(tmp_path / str(spread), bases[task], job, MemoryStore(data))
            trained = train_prepared(run)
            evaluated: Evaluated = evaluate(run, trained)
            publish(run, trained, evaluated)
            folder = run.settings.adapter_dir
            report = json.loads((folder / "report.json").read_text())
            analysis = report["analysis"]
            found.append((evaluated.metrics, evaluated.samples, analysis["update"], analysis["representation"]))
            assert not analysis.get("notes"), analysis["notes"]
            assert analysis["latency"]["variants"].keys() >= {"base", "tuned"}
            found[-1] += ({path.name: load_file(path) for path in folder.glob("*.safetensors")},)
            if spread:
                # With full, the evaluation and the report each load the base model again.
                assert len(pod.moved) >= (3 if "full" in method else 1)
                assert all(set(moved.values()) <= {0, 1, 2} for moved in pod.moved)
    assert found[0][:4] == found[1][:4]
    for name, weights in found[0][4].items():
        assert all(torch.equal(found[1][4][name][key], value) for key, value in weights.items())
