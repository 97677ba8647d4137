"""Datasets and base models from a Hub: here a few lines of HTTP server that speak as much of its protocol as is used."""

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from graft.contracts.progress import Reason
from graft_trainer.prepare import preflight, prepare_container
from graft_trainer.run.failures import explain
from graft_trainer.run.run import Prepared
from trainer_world import MemoryStore, chat_lines, make_base, make_job, make_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def etag(data: bytes) -> str:
    """Git's name of a blob, as the Hub gives it for files that are not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves files of one dataset and one model, both at one commit."""

    files: dict[str, bytes]  # "datasets/org/name/path" or "org/name/path"
    tokens: set[str]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if token := self.headers.get("Authorization"):
            self.server.tokens.add(token)
        repo, _, path = self.path.lstrip("/").partition("/resolve/")
        if repo.startswith("api/models/"):
            prefix = "org/model/"
            files = {
                name.removeprefix(prefix): data for name, data in self.server.files.items() if name.startswith(prefix)
            }
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files.items()
            ]
            info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, json.dumps(tree if "/tree/" in repo else info).encode(), body)
            return
        data = self.server.files.get(f"{repo}/{path.partition('/')[2]}")
        if data is None:
            self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.send(200, data, body, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    base = make_base(tmp_path / "base")
    server.files = {f"org/model/{path.name}": path.read_bytes() for path in base.iterdir()}
    server.files["datasets/org/data/sets/train.jsonl"] = chat_lines(5)
    server.tokens = set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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


def test_preflight_leaves_the_weights_at_the_hub(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint))
    preflight(run)
    brought = {path.name for path in run.settings.base_model_dir.iterdir() if path.is_file()}
    there = {name.rpartition("/")[2] for name in hub.files if name.startswith("org/model/")}
    assert brought == there - {"model.safetensors"}


def test_a_packed_file_of_the_hub_is_unpacked_and_kept_once(hub: Hub, tmp_path: Path) -> None:
    hub.files["datasets/org/data/sets/train.jsonl.gz"] = gzip.compress(chat_lines(5))
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint, "sets/train.jsonl.gz"))
    prepare_container(run)
    assert (run.settings.dataset_dir / "train.jsonl").read_bytes() == chat_lines(5)
    assert not list(run.settings.work_dir.rglob("train.jsonl.gz"))


def test_a_file_of_the_hub_that_is_too_large_is_not_fetched(
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


def test_a_file_that_the_repository_does_not_have(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), job_at(hub.endpoint, "sets/none.jsonl"))
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    failure = explain(caught.value)
    assert failure.reason == Reason.DATASET_UNAVAILABLE
    assert "no such file" in failure.message


def test_a_hub_that_does_not_answer_is_worth_another_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's own tries
    run = make_run(tmp_path, MemoryStore(), job_at("http://127.0.0.1:9"))
    with pytest.raises(Exception) as caught:
        prepare_container(run)
    assert explain(caught.value).reason == Reason.STORAGE_UNAVAILABLE
