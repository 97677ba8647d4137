"""train, evaluate and publish with a tiny base model."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graft.artifacts.manifest import Manifest, digest
from graft.contracts.progress import Progress, Reason
from graft_trainer.data.tokens import IGNORED, Tokenised
from graft_trainer.evaluation.generate import stop_tokens
from graft_trainer.model.loss import mean_loss
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.prepare import preflight, prepare_container
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Run
from safetensors.torch import load_file
from worlds.templates import TEMPLATES, chat_tokenizer
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run, train_prepared

PREFIX = "team-a/adapters/colours/1.0.0/"


pytestmark = pytest.mark.usefixtures("quick")


def prepared(root: Path, base: Path, store: MemoryStore | None = None, **changes: Any) -> tuple[Run, MemoryStore]:
    store = store or MemoryStore()
    store.kept |= {"team-a/data/train.jsonl": chat_lines(24), "team-a/data/eval.jsonl": chat_lines(6)}
    store.add_folder("models/tiny/", base)
    run = make_run(root, store, make_job(**changes))
    prepare_container(run)
    return run, store


def last_progress(run: Run, store: MemoryStore) -> Progress:
    assert run.progress.close(5)
    return Progress.model_validate_json(store.kept["team-a/runs/uid-1/pod-1/progress.json"])


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, MemoryStore]:
    training = {
        "maxSteps": 100, "learningRate": 0.03, "loggingSteps": 10, "perDeviceTrainBatchSize": 8,
        "gradientAccumulationSteps": 1, "evalSteps": 50,
    }  # fmt: skip
    run, store = prepared(tmp_path_factory.mktemp("run"), base, training=training, method={"lora": {"rank": 16}})
    train_evaluate_publish(run)
    return run, store


def test_the_manifest_is_written_last_and_matches_every_file(published: tuple[Run, MemoryStore]) -> None:
    _, store = published
    written = [key.removeprefix(PREFIX) for key in store.written if key.startswith(PREFIX)]
    assert written == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    ]
    manifest = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"])
    for file in manifest.files:
        assert hashlib.sha256(store.kept[PREFIX + file.name]).hexdigest() == file.sha256
    assert (manifest.job.attempt, manifest.rank, manifest.method) == ("pod-1", 16, "lora")
    assert manifest.datasets["train"] == digest(store.kept["team-a/data/train.jsonl"])
    assert not [key for key in store.kept if "/version/" in key], "the upload must leave no temporary objects"


def test_the_adapter_config_names_the_base_model_and_no_path_of_the_pod(published: tuple[Run, MemoryStore]) -> None:
    run, store = published
    config = json.loads(store.kept[PREFIX + "adapter_config.json"])
    assert (config["base_model_name_or_path"], config.get("revision")) == ("./tiny", None)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["peft_type"]) == (16, "LORA")
    assert str(run.settings.work_dir) not in store.kept[PREFIX + "adapter_config.json"].decode()
    weights = load_file(run.settings.adapter_dir / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)


def test_progress_and_events_report_the_whole_run(published: tuple[Run, MemoryStore]) -> None:
    run, store = published
    progress = last_progress(run, store)
    assert (progress.stage, progress.step, progress.total_steps, progress.percent) == ("Succeeded", 100, 100, 100)
    assert progress.manifest_digest == digest(store.kept[PREFIX + "manifest.json"])
    assert progress.training is not None and progress.training["maxLength"] == 128
    assert progress.target_modules is not None and "q_proj" in progress.target_modules
    assert progress.trainable_parameters == 32768
    assert progress.total_parameters is not None and progress.total_parameters > 100_000
    assert progress.tokens_per_second is not None and progress.tokens_per_second > 0
    events = [json.loads(line) for line in store.kept["team-a/runs/uid-1/pod-1/events.jsonl"].splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [1, *range(10, 101, 10)]
    assert [event["step"] for event in events if "evalLoss" in event] == [50, 100]
    assert progress.loss is not None and progress.loss < 0.2 * events[0]["loss"]


def test_the_adapter_answers_what_the_base_model_cannot_answer(published: tuple[Run, MemoryStore]) -> None:
    _, store = published
    metrics = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"]).metrics
    assert metrics["exactMatch"] == 1.0
    assert metrics["base/exactMatch"] == 0.0
    assert metrics["evalLoss"] < 0.2 < metrics["base/evalLoss"]
    report = json.loads(store.kept[PREFIX + "report.json"])
    assert report["metrics"] == metrics
    assert report["samples"][0] == {
        "prompt": "What colour is the sky?",
        "expected": "It is blue.",
        "answer": "It is blue.",
        "base/answer": report["samples"][0]["base/answer"],
        "metric": "exactMatch",
        "score": "1",
        "missed": "0 of 6",
    }
    assert report["precision"]["exactMatch"]["n"] == report["precision"]["base/evalLoss"]["n"] == 6
    assert report["precision"]["evalLoss"]["standardError"] > 0
    assert all(record["gradNorm"] > 0 for record in report["lossCurve"] if "loss" in record)
    weights = store.kept[PREFIX + "adapter_model.safetensors"]
    assert report["weights"] == {"adapter_model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert report["environment"]["device"] not in ("", "x86_64"), "the name of the CPU, not its architecture"
    assert report["dataset"]["heldOut"] == 6 and report["lossCurve"][-1]["step"] == 100


def test_an_attempt_after_the_publication_only_reports_success(
    published: tuple[Run, MemoryStore], tmp_path: Path
) -> None:
    _, store = published
    before = dict(store.kept)
    again = make_run(tmp_path, store, make_job())
    prepare_container(again)
    train_evaluate_publish(again)
    progress = last_progress(again, store)
    assert progress.stage == "Succeeded"
    assert progress.manifest_digest == digest(before[PREFIX + "manifest.json"])
    assert {key for key in store.kept if store.kept[key] != before.get(key)} <= {
        "team-a/runs/uid-1/pod-1/progress.json"
    }


def test_the_same_seed_gives_the_same_adapter(base: Path, tmp_path: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        training = {"maxSteps": 3, "seed": seed, "perDeviceTrainBatchSize": 4, "gradientAccumulationSteps": 1}
        root = tmp_path / str(len(weights))
        run, store = prepared(
            root, base, training=training, evaluation={"maxSamples": 0}, method={"lora": {"dropout": 0.1}}
        )
        train_evaluate_publish(run)
        run.progress.close(5)
        weights.append(store.kept[PREFIX + "adapter_model.safetensors"])
        assert "exactMatch" not in (last_progress(run, store).metrics or {})
    assert weights[0] == weights[1] != weights[2]


def test_qlora_trains_on_a_4_bit_base_model(base: Path, tmp_path: Path) -> None:
    training = {"maxSteps": 4, "gradientCheckpointing": True}
    run, store = prepared(
        tmp_path, base, method={"qlora": {"rank": 4, "targetModules": "attention"}}, training=training
    )
    train_evaluate_publish(run)
    manifest = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"])
    assert manifest.method == "qlora"
    assert manifest.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert manifest.hyperparameters["quantType"] == "nf4"
    assert manifest.metrics["evalLoss"] > 0
    assert last_progress(run, store).stage == "Succeeded"


def test_an_evaluation_leaves_4_bit_weights_differentiable(base: Path, tmp_path: Path) -> None:
    training = {"maxSteps": 2, "evalSteps": 1}
    run, _ = prepared(tmp_path, base, method={"qlora": {"rank": 4}}, training=training)
    model = train_prepared(run).model
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(states) == 14
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("dataset_format", ["text", "instruction"])
def test_text_and_instruction_datasets_can_be_trained_on(base: Path, tmp_path: Path, dataset_format: str) -> None:
    line = {"text": "The sky is blue."} if dataset_format == "text" else {"instruction": "Sky?", "output": "Blue."}
    dataset = {"train": {"uri": "pvc://data/t.jsonl"}, "evalSplit": 0.2, "format": dataset_format}
    if dataset_format == "instruction":
        dataset["templates"] = ["Q: {instruction}\nA: "]
    (tmp_path / "pvc/data").mkdir(parents=True)
    (tmp_path / "pvc/data/t.jsonl").write_text("\n".join([json.dumps(line)] * 10))
    run, store = prepared(tmp_path, base, dataset=dataset)
    train_evaluate_publish(run)
    metrics = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"]).metrics
    assert ("exactMatch" in metrics) == (dataset_format == "instruction")
    assert {"evalLoss", "base/evalLoss"} < metrics.keys()


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        (
            {
                "training": {
                    "maxSteps": 40,
                    "learningRate": 1.0,
                    "loggingSteps": 1,
                    "maxGradNorm": 1e30,
                    "weightDecay": 1e38,
                }
            },
            Reason.CONFIGURATION_INVALID,
            "training diverged",
        ),
    ],
)
def test_errors_that_only_training_can_find_are_reported(
    base: Path, tmp_path: Path, changes: dict[str, Any], reason: Reason, message: str
) -> None:
    run, _ = prepared(tmp_path, base, **changes)
    with pytest.raises(Failure) as caught:
        train_evaluate_publish(run)
    run.progress.close(2)
    assert caught.value.reason == reason
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"targetModuleNames": ["qkv"]}, "no qkv; it has down_proj"), ({"rank": 512}, "rank is 512")],
)
def test_modules_and_ranks_that_the_model_lacks_are_found_without_a_gpu(
    base: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    run, _ = prepared(tmp_path, base, method={"lora": lora})
    for stage in (preflight, train_evaluate_publish):  # a job that needs no GPU has no preflight
        with pytest.raises(Failure, match=message) as caught:
            stage(run)
        assert caught.value.reason == Reason.CONFIGURATION_INVALID


def test_weights_that_do_not_match_config_json_are_invalid(base: Path, tmp_path: Path) -> None:
    run, _ = prepared(tmp_path, base)
    config = run.settings.base_model_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(Failure, match=r"weights are missing, the first is model\.layers\.2") as caught:
        train_evaluate_publish(run)
    assert caught.value.reason == Reason.BASE_MODEL_INVALID


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("denied", Reason.UPLOAD_FAILED),
        ("full", Reason.UPLOAD_FAILED),
        ("unavailable", Reason.STORAGE_UNAVAILABLE),
        ("exists", Reason.VERSION_EXISTS),
    ],
)
def test_if_the_store_refuses_the_adapter_no_manifest_is_written(
    base: Path, tmp_path: Path, trouble: Any, reason: Reason
) -> None:
    run, store = prepared(tmp_path, base, evaluation={"maxSamples": 0})
    store.refuse["/version.json" if trouble == "exists" else "/version/adapter_model"] = trouble
    with pytest.raises(Failure) as caught:
        train_evaluate_publish(run)
    assert caught.value.reason == reason
    assert PREFIX + "manifest.json" not in store.kept


def test_a_lost_response_to_the_write_of_the_manifest_is_no_failure(base: Path, tmp_path: Path) -> None:
    class LosesTheAnswer(MemoryStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            super().put(key, data, if_absent=if_absent)
            if if_absent:  # botocore retries a write that has already succeeded
                super().put(key, data, if_absent=if_absent)

    run, store = prepared(tmp_path, base, LosesTheAnswer(), evaluation={"maxSamples": 0})
    train_evaluate_publish(run)
    assert last_progress(run, store).manifest_digest == digest(store.kept[PREFIX + "manifest.json"])


def test_the_mean_loss_over_tokens_does_not_depend_on_the_batch_size(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    examples = [Tokenised(list(range(8, 8 + n)), [IGNORED, *range(9, 8 + n)]) for n in (3, 9, 5, 30)]
    total = count = 0.0
    for item in examples:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss
        total += float(loss) * (len(item.labels) - 1)
        count += len(item.labels) - 1
    for batch in (1, 3, 8):
        assert mean_loss(model, examples, 0, batch) == pytest.approx(total / count, rel=1e-5)


def test_generation_stops_at_the_token_that_ends_the_training_answers() -> None:
    tokenizer = chat_tokenizer(TEMPLATES["chatml"])
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 9, 50]), config=config)
    trained = SimpleNamespace(model=model, tokenizer=tokenizer)
    assert stop_tokens(trained) == [2, tokenizer.convert_tokens_to_ids("<|im_end|>"), 9]  # type: ignore[arg-type]
