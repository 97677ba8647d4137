"""Datasets and base models from a Hub. The Hub is a small HTTP server with the part of the protocol that is used."""

import gzip
from pathlib import Path

import pytest
from graft.contracts.progress import Reason
from graft_trainer.prepare import preflight, prepare_container
from graft_trainer.run.failures import explain
from graft_trainer.run.run import Prepared
from worlds.hub import COMMIT, Hub
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run


def job_at(endpoint: str, path: str = "sets/train.jsonl"):  # type: ignore[no-untyped-def]
    return make_job(
        dataset={"train": {"uri": f"hf://datasets/org/data@{COMMIT}/{path}"}},
        baseModel={"name": "tiny", "uri": f"hf://org/model@{COMMIT}"},
        hfEndpoint=endpoint,
    )


def test_dataset_and_base_model_come_from_the_endpoint_with_the_tenants_token(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint))
    run.settings.hf_token_file.write_text("hf_tenant\n")
    prepare_container(run)
    assert (run.settings.dataset_dir / "train.jsonl").read_bytes() == chat_lines(5)
    folder = Path(Prepared.read(run.settings.prepared_file).base_model_dir)
    assert (folder / "model.safetensors").read_bytes() == hub.files["org/model/model.safetensors"]
    assert hub.tokens == {"Bearer hf_tenant"}


def test_preflight_does_not_download_the_weights(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint))
    preflight(run)
    brought = {path.name for path in run.settings.base_model_dir.iterdir() if path.is_file()}
    there = {name.rpartition("/")[2] for name in hub.files if name.startswith("org/model/")}
    assert brought == there - {"model.safetensors"}


def test_a_gzip_file_of_the_hub_is_decompressed_and_kept_only_once(hub: Hub, tmp_path: Path) -> None:
    hub.files["datasets/org/data/sets/train.jsonl.gz"] = gzip.compress(chat_lines(5))
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint, "sets/train.jsonl.gz"))
    prepare_container(run)
    assert (run.settings.dataset_dir / "train.jsonl").read_bytes() == chat_lines(5)
    assert not list(run.settings.work_dir.rglob("train.jsonl.gz"))


def test_a_file_of_the_hub_that_is_too_large_is_not_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft_trainer.run.download.LIMIT", 100)
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint))
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    failure = explain(caught.value)
    assert failure.reason == Reason.CONFIGURATION_INVALID
    assert "a file may have" in failure.message
    assert not any(path.name == "train.jsonl" for path in run.settings.work_dir.rglob("*"))


def test_a_file_that_the_repository_does_not_have_is_unavailable(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint, "sets/none.jsonl"))
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    failure = explain(caught.value)
    assert failure.reason == Reason.DATASET_UNAVAILABLE
    assert "no such file" in failure.message


def test_a_hub_that_does_not_answer_is_storage_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its own retries
    run = make_run(tmp_path, MemoryStore(), job_at("http://127.0.0.1:9"))
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    assert explain(caught.value).reason == Reason.STORAGE_UNAVAILABLE
