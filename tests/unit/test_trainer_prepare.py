"""prepare: what is wrong is found before a GPU is taken."""

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
from graft.artifacts.store import StoreError
from graft.contracts import EXIT_CODES, JobFile, Reason
from graft_trainer.basemodel import causal_architectures, check_base_model
from graft_trainer.failures import Failure, explain
from graft_trainer.prepare import prepare
from graft_trainer.run import Prepared
from trainer_world import MemoryStore, chat_lines, make_base, make_job, make_run

TRAIN, EVAL = "team-a/data/train.jsonl", "team-a/data/eval.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore({TRAIN: chat_lines(6), EVAL: chat_lines(3)})
    store.add_folder("models/tiny/", base)
    return store


def reason_of(tmp_path: Path, store: MemoryStore, job: JobFile) -> tuple[Reason, str]:
    run = make_run(tmp_path, store, job)
    with pytest.raises(Exception) as caught:
        prepare(run)
    run.progress.close(2)
    failure = explain(caught.value)
    return failure.reason, failure.message


def test_dataset_and_model_are_put_into_the_work_folder(tmp_path: Path, store: MemoryStore, base: Path) -> None:
    run = make_run(tmp_path, store, make_job())
    prepare(run)
    assert run.progress.close(2)
    prepared = Prepared.read(run.settings.prepared_file)
    assert (run.settings.dataset_dir / "train.jsonl").read_bytes() == store.kept[TRAIN]
    assert set(prepared.digests) == {"train", "eval"}
    assert {path.name for path in Path(prepared.base_model_dir).iterdir()} == {path.name for path in base.iterdir()}
    assert json.loads(store.kept["team-a/runs/uid-1/pod-1/progress.json"])["stage"] == "Preparing"


def test_files_of_claims_and_config_maps_are_read_where_they_are_mounted(
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
    prepare(run)
    assert Prepared.read(run.settings.prepared_file).base_model_dir == str(run.settings.pvc_dir / "models/tiny")


@pytest.mark.parametrize(
    "uri", [f"s3://bucket/{EVAL}x", "pvc://data/none.jsonl", "pvc://data/../../etc/passwd", "configMap://none/key"]
)
def test_a_dataset_that_is_not_there(tmp_path: Path, store: MemoryStore, uri: str) -> None:
    reason, message = reason_of(tmp_path, store, make_job(dataset={"train": {"uri": uri}}))
    assert reason == Reason.DATASET_UNAVAILABLE
    assert "dataset.train" in message and uri in message


def test_a_bad_line_of_the_held_out_file(tmp_path: Path, store: MemoryStore) -> None:
    store.kept[EVAL] += b"oops\n"
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.DATASET_INVALID
    assert f"dataset.eval (s3://bucket/{EVAL}): 1 of 4 lines is invalid: line 4: not JSON" in message


def test_a_base_model_that_is_not_there_or_changed(tmp_path: Path, store: MemoryStore) -> None:
    for model in (
        {"name": "tiny", "uri": "s3://bucket/models/none"},
        {"name": "tiny", "uri": "s3://bucket/models/tiny", "digest": "sha256:0"},
    ):
        assert reason_of(tmp_path, store, make_job(baseModel=model))[0] == Reason.BASE_MODEL_UNAVAILABLE


def test_only_pickled_weights_in_storage(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["models/tiny/pytorch_model.bin"] = store.kept.pop("models/tiny/model.safetensors")
    assert reason_of(tmp_path, store, make_job())[0] == Reason.BASE_MODEL_INVALID


def test_a_version_of_another_job_is_not_trained_again(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["team-a/adapters/colours/1.0.0/manifest.json"] = b"{}"
    assert reason_of(tmp_path, store, make_job())[0] == Reason.VERSION_EXISTS


def test_a_chat_dataset_needs_a_chat_template(tmp_path: Path, store: MemoryStore) -> None:
    store.kept.pop("models/tiny/chat_template.jinja")
    reason, message = reason_of(tmp_path, store, make_job())
    assert reason == Reason.CONFIGURATION_INVALID
    assert "no chat template" in message


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))


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
        (index, "lacks 1 of 1 weight files: model-00002.safetensors"),
        (no_tokenizer, "has no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_tuned(tmp_path: Path, base: Path, damage: Callable[[Path], None], problem: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    assert check_base_model(folder, "tiny")["model_type"] == "llama"
    damage(folder)
    with pytest.raises(Failure) as caught:
        check_base_model(folder, "tiny")
    assert caught.value.reason == Reason.BASE_MODEL_INVALID
    assert problem in caught.value.message


def test_the_architectures_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_architectures().keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def pod(tmp_path: Path, endpoint: str) -> tuple[dict[str, str], Path]:
    """(environment, termination file) of a container with an S3 endpoint."""
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


def test_a_missing_key_of_the_secret_is_named() -> None:
    assert explain(StoreError("denied", "the storage Secret has no key bucket")).reason == Reason.STORAGE_DENIED
