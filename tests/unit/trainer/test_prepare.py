"""prepare finds errors in the job, the dataset and the base model before the run takes a GPU."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.storage import StoreError
from graft.contracts.job import JobFile
from graft.contracts.progress import EXIT_CODES, DatasetStatistics, Reason
from graft_trainer.data.read import read_data
from graft_trainer.model.basemodel import MAPPINGS, architectures, check_base_model, context_of, load_config
from graft_trainer.prepare import preflight, prepare, prepare_container
from graft_trainer.run.failures import Failure, explain
from graft_trainer.run.run import Prepared
from worlds.trainer import MARKED, QUESTIONS, MemoryStore, chat_lines, make_job, make_run, make_t5

TRAIN, EVAL = "team-a/data/train.jsonl", "team-a/data/eval.jsonl"


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore({TRAIN: chat_lines(6), EVAL: chat_lines(3)})
    store.add_folder("models/tiny/", base)
    return store


def reason_of(tmp_path: Path, store: MemoryStore, job: JobFile) -> tuple[Reason, str]:
    run = make_run(tmp_path, store, job)
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    run.progress.close(2)
    failure = explain(caught.value)
    return failure.reason, failure.message


def test_dataset_and_model_are_put_into_the_work_folder(tmp_path: Path, store: MemoryStore, base: Path) -> None:
    run = make_run(tmp_path, store, make_job())
    prepare_container(run)
    assert run.progress.close(2)
    prepared = Prepared.read(run.settings.prepared_file)
    assert (run.settings.dataset_dir / "train.jsonl").read_bytes() == store.kept[TRAIN]
    assert set(prepared.digests) == {"train", "eval"}
    assert {path.name for path in Path(prepared.base_model_dir).iterdir()} == {path.name for path in base.iterdir()}
    assert json.loads(store.kept["team-a/runs/uid-1/pod-1/progress.json"])["stage"] == "Preparing"


def test_preflight_checks_everything_and_does_not_download_the_weights(
    tmp_path: Path, store: MemoryStore, base: Path
) -> None:
    run = make_run(tmp_path, store, make_job())
    preflight(run)
    assert run.progress.close(2)
    told = json.loads(store.kept["team-a/runs/uid-1/pod-1/progress.json"])
    assert told["dataset"]["examples"] == 6 and not told["dataset"]["sampled"]
    brought = {path.name for path in run.settings.base_model_dir.iterdir()}
    assert brought == {path.name for path in base.iterdir() if path.suffix != ".safetensors"}

    store.kept[TRAIN] += b"nonsense\n"
    with pytest.raises(Failure, match="line 7: not JSON"):
        preflight(make_run(tmp_path / "2", store, make_job()))
    for name in [name for name in store.kept if name.endswith(".safetensors")]:
        del store.kept[name]
    store.kept[TRAIN] = chat_lines(6)
    with pytest.raises(Exception, match="no safetensors weights"):
        preflight(make_run(tmp_path / "3", store, make_job()))


def test_preflight_checks_mounted_weights(tmp_path: Path, store: MemoryStore, base: Path) -> None:
    shutil.copytree(base, tmp_path / "pvc/weights/tiny")
    (weights,) = (tmp_path / "pvc/weights/tiny").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    job = make_job(baseModel={"name": "tiny", "uri": "pvc://weights/tiny"})
    with pytest.raises(Failure, match=r"has \d+ bytes, but its header says"):
        preflight(make_run(tmp_path, store, job))


def test_progress_reports_the_statistics_of_the_dataset(tmp_path: Path, store: MemoryStore) -> None:
    with_id = chat_lines(3).replace(b'{"messages"', b'{"id": 7, "messages"')
    store.kept[TRAIN] = with_id + b"nonsense\n" + chat_lines(3) + b"[]\n"
    dataset = {"train": {"uri": f"s3://bucket/{TRAIN}"}, "eval": {"uri": f"s3://bucket/{EVAL}"}, "onInvalid": "skip"}
    run = make_run(tmp_path, store, make_job(dataset=dataset))
    prepare_container(run)
    assert run.progress.close(2)
    told = json.loads(store.kept["team-a/runs/uid-1/pod-1/progress.json"])["dataset"]
    # One token per byte, and four special tokens: <s><|user|>question<|assistant|>answer</s>
    sizes = sorted(4 + len(question) + len(answer) for question, answer in QUESTIONS.items())
    assert told == {
        "examples": 6, "heldOut": 3, "invalid": 2, "tokens": 2 * sum(sizes), "meanTokens": round(sum(sizes) / 3, 1),
        "medianTokens": sizes[1], "p95Tokens": sizes[2], "maxTokens": sizes[2], "truncatedShare": 0.0,
        "sampled": False, "invalidReasons": {"format": 2}, "unreadFields": {"id": 3}, "repeated": 3,
        "learned": [
            f"line {line}: <s><|user|>{question}<|assistant|>⟦{answer}</s>⟧"
            for line, (question, answer) in enumerate(QUESTIONS.items(), start=1)
        ],
    }  # fmt: skip
    assert Prepared.read(run.settings.prepared_file).statistics == DatasetStatistics.model_validate(told)


def test_skipped_lines_are_logged(tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    store.kept[EVAL] += b"nonsense\n"
    dataset = {"train": {"uri": f"s3://bucket/{TRAIN}"}, "eval": {"uri": f"s3://bucket/{EVAL}"}, "onInvalid": "skip"}
    prepare(make_run(tmp_path, store, make_job(dataset=dataset)))
    assert "dataset.eval: 1 invalid lines are left out (25.0 %): line 4: not JSON" in caplog.text


def test_held_out_examples_use_the_first_template(tmp_path: Path, store: MemoryStore) -> None:
    templates = ["Q: {instruction}", "Task: {instruction}", "{instruction}!"]
    lines = [json.dumps({"instruction": f"task {number}", "output": "done"}) for number in range(60)]
    store.kept[TRAIN] = "\n".join(lines).encode()
    dataset = {
        "train": {"uri": f"s3://bucket/{TRAIN}"},
        "evalSplit": 0.25,
        "format": "instruction",
        "templates": templates,
    }
    run = make_run(tmp_path, store, make_job(dataset=dataset))
    prepare_container(run)
    data = read_data(run.job.dataset, run.settings.dataset_dir, run.job.training.seed)
    train, held_out = data.train, data.held_out
    assert (len(train), len(held_out)) == (45, 15)
    assert all(example.prompt.startswith("Q: ") for example in held_out)
    assert {example.prompt.split("task")[0] for example in train} == {"Q: ", "Task: ", ""}


def test_truncated_examples_are_logged_with_the_length_to_set(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(training={"maxLength": 35})
    prepare(make_run(tmp_path, store, job))
    assert "67 % of the examples are cut to 35 tokens; the longest has 38 tokens" in caplog.text
    assert "Raise spec.training.maxLength to 64: then 100 % of the examples stay whole" in caplog.text


def test_a_max_length_that_is_too_short_or_too_long_is_refused(tmp_path: Path, store: MemoryStore) -> None:
    reason, message = reason_of(tmp_path, store, make_job(training={"maxLength": 8}))
    assert reason == Reason.DATASET_INVALID
    assert "none of the 6 examples has a token to train on within 8 tokens" in message
    reason, message = reason_of(tmp_path / "2", store, make_job(training={"maxLength": 4096}))
    assert reason == Reason.CONFIGURATION_INVALID
    assert "the model's context is 128 tokens" in message


def test_an_optimizer_that_does_not_support_sharded_weights_is_refused(tmp_path: Path, store: MemoryStore) -> None:
    training = {"optim": "adafactor", "sharding": "fsdp"}
    job = make_job(method={"full": {}}, training=training, pods={"processesPerNode": 2})
    reason, message = reason_of(tmp_path, store, job)
    assert reason == Reason.CONFIGURATION_INVALID
    assert (
        "training.optim is adafactor, which does not support weights that are sharded (fsdp) over 2 processes"
        in message
    )


def test_a_conversation_that_the_chat_template_refuses_is_reported_with_its_line(
    tmp_path: Path, store: MemoryStore
) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    store.kept["models/tiny/chat_template.jinja"] = (strict + MARKED).encode()
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    store.kept[TRAIN] += json.dumps({"messages": turns}).encode()
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.DATASET_INVALID
    assert "line 7: the base model's chat template refuses the conversation: no system role" in message


def test_a_key_that_cannot_publish_fails_before_any_download(tmp_path: Path, store: MemoryStore) -> None:
    store.refuse["/version.json"] = "denied"
    store.kept.pop(TRAIN)
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.STORAGE_DENIED
    assert "could not be published" in message


def test_files_of_volume_claims_and_config_maps_are_read_from_their_mounts(
    tmp_path: Path, store: MemoryStore, base: Path
) -> None:
    job = make_job(
        dataset={"train": {"uri": "pvc://data/sets/train.jsonl"}, "eval": {"uri": "configMap://held-out/eval.jsonl"}},
        baseModel={"name": "tiny", "uri": "pvc://models/tiny"},
    )
    run = make_run(tmp_path, store, job)
    for path in (run.settings.pvc_dir / "data/sets/train.jsonl", run.settings.configmap_dir / "held-out/eval.jsonl"):
        path.parent.mkdir(parents=True)
        path.write_bytes(chat_lines(3))
    shutil.copytree(base, run.settings.pvc_dir / "models/tiny")
    prepare_container(run)
    assert Prepared.read(run.settings.prepared_file).base_model_dir == str(run.settings.pvc_dir / "models/tiny")


@pytest.mark.parametrize(
    "uri", [f"s3://bucket/{EVAL}x", "pvc://data/none.jsonl", "pvc://data/link/passwd", "configMap://none/key"]
)
def test_a_missing_dataset_is_unavailable(tmp_path: Path, store: MemoryStore, uri: str) -> None:
    (tmp_path / "pvc" / "data").mkdir(parents=True)
    (tmp_path / "pvc" / "data" / "link").symlink_to("/etc")  # it leads out of the claim
    reason, message = reason_of(tmp_path, store, make_job(dataset={"train": {"uri": uri}}))
    assert reason == Reason.DATASET_UNAVAILABLE
    assert "dataset.train" in message and uri in message


def test_an_invalid_line_of_the_held_out_file_is_reported(tmp_path: Path, store: MemoryStore) -> None:
    store.kept[EVAL] += b"oops\n"
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.DATASET_INVALID
    assert f"dataset.eval (s3://bucket/{EVAL}): 1 of 4 lines is invalid: line 4: not JSON" in message


def test_a_missing_or_changed_base_model_is_unavailable(tmp_path: Path, store: MemoryStore) -> None:
    for model in (
        {"name": "tiny", "uri": "s3://bucket/models/none"},
        {"name": "tiny", "uri": "s3://bucket/models/tiny", "digest": "sha256:0"},
    ):
        assert reason_of(tmp_path, store, make_job(baseModel=model))[0] == Reason.BASE_MODEL_UNAVAILABLE


def test_a_base_model_with_only_pickled_weights_is_invalid(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["models/tiny/pytorch_model.bin"] = store.kept.pop("models/tiny/model.safetensors")
    assert reason_of(tmp_path, store, make_job())[0] == Reason.BASE_MODEL_INVALID


def test_a_version_that_another_job_has_published_already_exists(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["team-a/adapters/colours/1.0.0/manifest.json"] = b"{}"
    assert reason_of(tmp_path, store, make_job())[0] == Reason.VERSION_EXISTS


def test_a_chat_dataset_needs_a_chat_template(tmp_path: Path, store: MemoryStore) -> None:
    store.kept.pop("models/tiny/chat_template.jinja")
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.CONFIGURATION_INVALID
    assert "no chat template" in message


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5"))


def seq2seq_store(t5: Path) -> MemoryStore:
    store = MemoryStore({TRAIN: chat_lines(6), EVAL: chat_lines(3)})
    store.add_folder("models/tiny/", t5)
    return store


def test_a_seq2seq_model_needs_no_chat_template(tmp_path: Path, t5: Path) -> None:
    run = make_run(tmp_path, seq2seq_store(t5), make_job(task="seq2seq"))
    prepare_container(run)
    # This tokenizer adds no </s> to the question of the encoder. The answer of the decoder has one.
    told = Prepared.read(run.settings.prepared_file).dataset
    assert told["max_tokens"] == max(len(question) + len(answer) + 1 for question, answer in QUESTIONS.items())


def test_format_text_is_refused_for_a_seq2seq_model(tmp_path: Path, t5: Path) -> None:
    store = seq2seq_store(t5)
    store.kept[TRAIN] = b'{"text": "Once upon a time"}\n'
    job = make_job(task="seq2seq", dataset={"train": {"uri": f"s3://bucket/{TRAIN}"}, "format": "text"})
    reason, message = reason_of(tmp_path, store, job)
    assert reason == Reason.CONFIGURATION_INVALID
    assert "dataset.format is text" in message


def test_a_model_that_does_not_match_the_task_of_its_basemodel_is_invalid(tmp_path: Path, base: Path, t5: Path) -> None:
    for folder, task, actual in ((base, "seq2seq", "causal"), (t5, "causal", "seq2seq")):
        with pytest.raises(Failure) as caught:
            check_base_model(folder, "tiny", task)  # type: ignore[arg-type]
        assert caught.value.reason == Reason.BASE_MODEL_INVALID
        assert f"tiny is a {actual} model" in caught.value.message
        assert f"Set spec.task of the BaseModel tiny to {actual}" in caught.value.remedy
    copied = tmp_path / "t5"
    shutil.copytree(t5, copied)
    config = json.loads((copied / "config.json").read_text())
    config.pop("is_encoder_decoder")
    (copied / "config.json").write_text(json.dumps(config))
    assert check_base_model(copied, "tiny", "seq2seq")["model_type"] == "t5"


def test_the_context_is_read_from_config_json_and_is_unknown_for_t5(base: Path, t5: Path) -> None:
    assert context_of(load_config(base, "tiny")) == 128
    assert context_of(load_config(t5, "tiny")) is None


def change(file: str, **fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shards = {"a": "model-00001-of-00001.safetensors", "b": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def shards_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change("config.json", auto_map={"AutoModel": "x.Y"}), "config.json has auto_map"),
        (change("tokenizer_config.json", auto_map={"AutoTokenizer": "x"}), "tokenizer_config.json has auto_map"),
        (change("config.json", model_type="brand-new", architectures=["NewForCausalLM"]), "NewForCausalLM"),
        (change("config.json", model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (change("config.json", architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (pickled, "no weights in safetensors, only pytorch_model.bin"),
        (cut, "its header says"),
        (index, "lacks 1 of 2 weight files: model-00002.safetensors"),
        (shards_alone, "has shards but no model.safetensors.index.json"),
        (no_tokenizer, "has no tokenizer"),
    ],
)
def test_a_base_model_that_cannot_be_tuned_is_invalid(
    tmp_path: Path, base: Path, damage: Callable[[Path], None], problem: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    assert check_base_model(folder, "tiny")["model_type"] == "llama"
    damage(folder)
    with pytest.raises(Failure) as caught:
        check_base_model(folder, "tiny")
    assert caught.value.reason == Reason.BASE_MODEL_INVALID
    assert problem in caught.value.message


def test_the_architectures_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto

    assert architectures(MAPPINGS["causal"]).keys() == modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert (
        architectures(MAPPINGS["seq2seq"]).keys() == modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    )


def pod(tmp_path: Path, endpoint: str) -> tuple[dict[str, str], Path]:
    """Return the environment and the termination file of a container with this S3 endpoint."""
    storage = tmp_path / "storage"
    storage.mkdir()
    for name, value in {
        "endpoint": endpoint, "bucket": "bucket", "prefix": "team-a/", "access-key-id": "a", "secret-access-key": "S3CR3T",
    }.items():  # fmt: skip
        (storage / name).write_text(value)
    (tmp_path / "job.json").write_text(make_job().json_text())
    (tmp_path / "work").mkdir()
    paths = {
        "GRAFT_JOB_FILE": "job.json", "GRAFT_STORAGE_DIR": "storage", "GRAFT_WORK_DIR": "work",
        "GRAFT_TERMINATION_FILE": "termination",
    }  # fmt: skip
    environment = {name: str(tmp_path / path) for name, path in paths.items()}
    return dict(os.environ) | environment | {
        "POD_NAME": "pod-1",
        "GRAFT_STORAGE_PATIENCE": "0",
    }, tmp_path / "termination"


def test_an_unreachable_store_ends_the_container_with_a_message(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        environment, termination = pod(tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}")
        done = subprocess.run(
            [sys.executable, "-m", "graft_trainer", "prepare"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == EXIT_CODES[Reason.STORAGE_UNAVAILABLE], done.stdout + done.stderr
    assert json.loads(termination.read_text())["reason"] == "StorageUnavailable"
    assert "what to do" in done.stdout
    assert "S3CR3T" not in done.stdout + done.stderr + termination.read_text()


def test_sigterm_ends_a_container_that_waits_for_the_store(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment, termination = pod(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        process = subprocess.Popen([sys.executable, "-m", "graft_trainer", "prepare"], env=environment)
        silent.settimeout(60)
        connection, _ = silent.accept()
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == EXIT_CODES[Reason.INTERRUPTED]
        assert time.monotonic() - begin < 12
        connection.close()
    assert json.loads(termination.read_text())["reason"] == "Interrupted"


def test_a_missing_key_of_the_secret_is_storage_denied() -> None:
    assert explain(StoreError("denied", "the storage Secret has no key bucket")).reason == Reason.STORAGE_DENIED
