"""A small Hugging Face Hub: an HTTP server with the part of the protocol that the trainer uses."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from worlds.trainer import chat_lines, make_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def etag(data: bytes) -> str:
    """Return Git's hash of a blob. The Hub sends it as the ETag of files that are not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves the files of one dataset and one model, both at one commit."""

    files: dict[str, bytes]  # by path: "datasets/org/name/path" or "org/name/path"
    tokens: set[str]
    heads: dict[str, str]  # the commits of the model's branches, if they are others than COMMIT

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
            revision = repo.partition("/revision/")[2].partition("?")[0]
            info = {
                "id": "org/model",
                "sha": self.server.heads.get(revision, COMMIT),
                "siblings": [{"rfilename": name} for name in files],
            }
            if not info["sha"]:
                self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
                return
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
    server.tokens, server.heads = set(), {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
