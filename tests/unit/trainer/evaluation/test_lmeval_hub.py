"""The tasks of lm-eval: prepare downloads their data from the Hugging Face endpoint, and train loads them offline."""

import hashlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from graft.api.evaluation import Suite
from graft.contracts.progress import Reason, Termination
from graft_trainer.evaluation.lmeval_prefetch import prefetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "datasets/allenai/ai2_arc"
CARD = b"""---
configs:
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/train-*}
  - {split: test, path: ARC-Easy/test-*}
  - {split: validation, path: ARC-Easy/validation-*}
---
"""
# The container of train has no network. Of the tasks, one was downloaded, one was not, and one does not exist.
OFFLINE = """
import sys
from pathlib import Path
from graft_trainer.evaluation.lmeval_prefetch import main
for task in ("arc_easy", "hellaswag", "arc_esay"):
    if main(Path(), '{"suites": [{"name": "arc", "lmEval": {"task": "%s"}}]}' % task) == 0:
        print("loaded")
assert "torch" not in sys.modules
"""


def questions(count: int) -> bytes:
    rows = [
        {"question": f"{n}?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "A"}
        for n in range(count)
    ]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


FILES = {"README.md": CARD} | {
    f"ARC-Easy/{split}-00000-of-00001.parquet": questions(4) for split in ("train", "test", "validation")
}


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a dataset of Parquet files needs."""

    tokens: set[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        path = urlsplit(self.path).path.lstrip("/")
        _, _, below = path.partition("/tree/")
        if "/resolve/" in path:
            self.file(path.partition("/resolve/")[2].partition("/")[2])
        elif below:
            self.json(self.listing(below.partition("/")[2]))
        elif path.startswith(f"api/{DATASET}"):
            self.json({"id": "allenai/ai2_arc", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        else:
            self.reply(404, b"")

    do_HEAD = do_GET

    def listing(self, folder: str) -> list[dict[str, object]]:
        names = [name for name in FILES if str(Path(name).parent) == (folder or ".")]
        entries: list[dict[str, object]] = [
            {"type": "file", "path": name, "size": len(FILES[name]), "oid": etag(FILES[name])} for name in names
        ]
        return entries if folder else [*entries, {"type": "directory", "path": "ARC-Easy", "size": 0, "oid": COMMIT}]

    def file(self, name: str) -> None:
        if name in FILES:
            self.reply(200, FILES[name], {"ETag": f'"{etag(FILES[name])}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.tokens = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_train_loads_without_a_network_the_tasks_that_prepare_downloaded(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    prefetch([Suite.model_validate({"name": "arc", "lmEval": {"task": "arc_easy"}})], tmp_path, endpoint, "hf_tenant")
    assert "Bearer hf_tenant" in Hub.tokens

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = subprocess.run([sys.executable, "-c", OFFLINE], stdout=subprocess.PIPE, text=True, check=True)
    fetched, *failures = result.stdout.splitlines()
    assert fetched == "loaded"
    absent, typo = (Termination.model_validate_json(line) for line in failures)
    assert absent.reason == Reason.DATASET_UNAVAILABLE
    assert "evaluation.suites arc: the lm-eval task hellaswag cannot be loaded" in absent.message
    assert typo.reason == Reason.CONFIGURATION_INVALID
    assert typo.message == "spec.evaluation.suites arc: lm-eval has no task arc_esay"
