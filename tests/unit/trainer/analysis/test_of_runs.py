"""The analysis of trained models of every method and both tasks, and the reports that are made from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.report.document import Analysis, Report
from graft_trainer import train as train_module
from graft_trainer.analysis import latency
from graft_trainer.analysis.analysis import analyse
from graft_trainer.evaluation.evaluate import Evaluated
from graft_trainer.run.run import Prepared, Run
from graft_trainer.train import Trained
from graft_trainer.versions.report import quantized_size, write_report
from worlds.trainer import MemoryStore, chat_lines, make_base, make_job, make_run, make_t5, train_prepared

TRAINING = {"maxSteps": 3, "loggingSteps": 1, "perDeviceTrainBatchSize": 4, "gradientAccumulationSteps": 1, "learningRate": 0.01}  # fmt: skip
INSTRUCTIONS = b'{"instruction": "What colour is the sky?", "output": "It is blue."}\n{"instruction": "And snow?", "output": "White it is."}\n'  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"causal": make_base(tmp_path_factory.mktemp("llama")), "seq2seq": make_t5(tmp_path_factory.mktemp("t5"))}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "cpu_limit", lambda: 1)
    monkeypatch.setattr(latency, "MOST", latency.FEWEST)
    monkeypatch.setattr(latency, "NEW_TOKENS", 4)
    monkeypatch.setattr(latency, "PATIENCE", 100)  # the tests must also pass on a busy machine


def tuned(root: Path, base: Path, method: dict[str, Any], task: str = "causal") -> tuple[Run, Trained]:
    dataset: dict[str, Any] = {"train": {"uri": "s3://bucket/train.jsonl"}, "eval": {"uri": "s3://bucket/eval.jsonl"}}
    lines = chat_lines(12)
    if task == "seq2seq":
        lines, dataset = 6 * INSTRUCTIONS, dataset | {"format": "instruction", "templates": ["{instruction}"]}
    run = make_run(root, MemoryStore(), make_job(method=method, task=task, training=TRAINING, dataset=dataset))
    run.settings.dataset_dir.mkdir(parents=True)
    for role in ("train", "eval"):
        (run.settings.dataset_dir / f"{role}.jsonl").write_bytes(lines)
    Prepared(str(base), {"train": "sha256:train"}).write(run.settings.prepared_file)
    return run, train_prepared(run)


def kinds(analysis: Analysis) -> set[str]:
    assert analysis.update is not None
    return {matrix.kind for matrix in analysis.update.matrices}


def test_lora_is_analysed_and_reported(bases: dict[str, Path], tmp_path: Path) -> None:
    run, trained = tuned(tmp_path, bases["causal"], {"lora": {"rank": 4}})
    weights = trained.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weights.detach().clone()
    found = analyse(trained)
    assert found.notes == []
    assert found.update is not None and (found.update.total, found.update.rank) == (14, 4)
    assert kinds(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    matrix = found.update.matrices[0]
    assert (matrix.name, matrix.layer, matrix.shape) == ("model.layers.0.self_attn.q_proj", 0, [64, 64])
    module = trained.model.base_model.model.model.layers[0].self_attn.q_proj
    dense = module.get_delta_weight("default").detach()
    assert matrix.singular_values == pytest.approx(torch.linalg.svdvals(dense)[:4].tolist(), rel=1e-3)
    assert matrix.relative_norm == pytest.approx(float(dense.norm() / before.norm()), rel=1e-3)
    assert found.representation is not None
    layers = found.representation.layers
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert layers[0].cka == pytest.approx(1) and 0 < layers[2].cka < 1  # training does not change the embeddings
    assert found.latency is not None and found.latency.runs == 5
    assert set(found.latency.variants) == {"base", "tuned", "merged"}
    assert all(0 < it.seconds_per_token < 1 for it in found.latency.variants.values())
    torch.testing.assert_close(weights.detach(), before)  # the adapter does not stay merged
    assert not module.merged

    trained.model.save_pretrained(tmp_path / "out")
    evaluated = Evaluated({"exactMatch": 0.5, "evalLoss": float("nan")}, rejected=["exactMatch is 0.5"])
    write_report(run, trained, evaluated, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    report = Report.model_validate(written)
    assert (report.schema_version, report.method, report.metrics) == (2, "lora", {"exactMatch": 0.5})
    assert report.resources.published_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert report.resources.base_bytes == (bases["causal"] / "model.safetensors").stat().st_size
    assert report.evaluation.rejected == ["exactMatch is 0.5"] and "analyse" in report.seconds
    assert "Rejected" in (tmp_path / "out" / "report.html").read_text()


def test_full_is_analysed(bases: dict[str, Path], tmp_path: Path) -> None:
    _, trained = tuned(tmp_path, bases["causal"], {"full": {}})
    found = analyse(trained)
    assert found.notes == []
    assert {"embed_tokens", "lm_head", "q_proj"} <= kinds(found)
    assert found.update is not None and all(matrix.norm > 0 and matrix.exact for matrix in found.update.matrices)
    assert found.latency is not None and set(found.latency.variants) == {"base", "tuned"}
    assert found.representation is not None and len(found.representation.layers) == 3


def test_qlora_is_analysed(bases: dict[str, Path], tmp_path: Path) -> None:
    _, trained = tuned(tmp_path, bases["causal"], {"qlora": {"rank": 4}})
    found = analyse(trained)
    assert found.notes == []
    assert found.update is not None and all((matrix.relative_norm or 0) > 0 for matrix in found.update.matrices)
    assert found.update.matrices[0].shape == [64, 64]  # the shape of the matrix, not of its packed bytes
    assert found.latency is not None and set(found.latency.variants) == {"base", "tuned"}
    stored = (bases["causal"] / "model.safetensors").stat().st_size  # float32
    assert stored / 8 < quantized_size(trained.model) < stored / 2


def test_prompt_tuning_is_analysed(bases: dict[str, Path], tmp_path: Path) -> None:
    _, trained = tuned(tmp_path, bases["causal"], {"promptTuning": {"virtualTokens": 6}})
    found = analyse(trained)
    assert found.notes == []
    assert found.update is not None and [(it.kind, it.shape) for it in found.update.matrices] == [("prompt", [6, 64])]
    layers = found.representation.layers if found.representation else []
    assert (
        layers[0].cka == pytest.approx(1) and layers[2].cka < 1
    )  # the embeddings of the tokens follow those of the prompt
    assert found.latency is not None and set(found.latency.variants) == {"base", "tuned"}


@pytest.mark.parametrize("method", [{"lora": {"rank": 4}}, {"promptTuning": {"virtualTokens": 6}}, {"full": {}}])
def test_seq2seq_models_are_analysed(bases: dict[str, Path], tmp_path: Path, method: dict[str, Any]) -> None:
    _, trained = tuned(tmp_path, bases["seq2seq"], method, "seq2seq")
    found = analyse(trained)
    assert found.notes == []
    assert found.representation is not None
    assert {layer.part for layer in found.representation.layers} == {"encoder", "decoder"}
    assert found.latency is not None
    if "lora" in method:
        assert {"encoder.SelfAttention.q", "decoder.EncDecAttention.q"} <= kinds(found)


def test_if_a_part_of_the_analysis_fails_a_note_replaces_it(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trained = tuned(tmp_path, bases["causal"], {"lora": {"rank": 4}})

    def full_gpu(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("graft_trainer.analysis.analysis.grams", full_gpu)
    found = analyse(trained)
    assert found.update is not None and found.latency is not None and found.representation is None
    assert found.notes == ["There was not enough memory to analyse the hidden states."]


def test_if_a_model_is_too_slow_a_note_replaces_its_latency(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trained = tuned(tmp_path, bases["causal"], {"lora": {"rank": 4}})
    monkeypatch.setattr(latency, "PATIENCE", 0)
    found = analyse(trained)
    assert found.latency is None and found.update is not None
    assert found.notes == ["Latency was not measured: the model is too slow on this machine."]
