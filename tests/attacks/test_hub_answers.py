"""A hub, or a mirror of one, answers with more than its reader can hold."""

import gzip
import json
import re
import secrets
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from graft.artifacts.hub import ANSWER, ERROR_BYTES, HfApi
from graft.artifacts.sources import SourceError, describe

COMMIT = secrets.token_hex(20)  # the library caches files by commit
CONFIG = {"model_type": "llama", "hidden_size": 64}
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            headers = {"ETag": '"e"', "X-Repo-Commit": COMMIT}
            self.whole(200, json.dumps(CONFIG).encode(), headers)
        elif self.path.endswith("/elsewhere"):
            self.whole(200, listing())
        else:
            self.server.answer(self)  # type: ignore[attr-defined]

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def whole(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(data)), **(headers or {})})
        if self.command == "GET":
            self.wfile.write(data)

    def endless(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Send bytes until the client closes the connection."""
        self.head(status, {"Connection": "close", **(headers or {})})
        try:
            while True:
                self.wfile.write(b'{"a": "' + b"x" * 65536)
                self.server.sent += 65536  # type: ignore[attr-defined]
        except OSError:
            self.close_connection = True


def listing(names: tuple[str, ...] = ("config.json", "model.safetensors")) -> bytes:
    return json.dumps({
        "id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name, "size": 40} for name in names],
    }).encode()  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub: Any, answer: Answer) -> Any:
    hub.answer = answer
    return describe("hf://org/model", None, f"http://127.0.0.1:{hub.server_address[1]}")


def test_an_honest_hub_is_read(hub: Any) -> None:
    """No attack: a listing, also behind a redirect; a missing repository."""
    assert ask(hub, lambda to: to.whole(200, listing())).revision == COMMIT
    moved = {"Location": "/api/models/elsewhere"}
    assert ask(hub, lambda to: to.whole(307, b"", moved)).config == CONFIG
    with pytest.raises(SourceError, match="does not exist, or needs a token") as error:
        ask(hub, lambda to: to.whole(404, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"}))
    assert not error.value.transient


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_an_answer_without_end(hub: Any, status: int) -> None:
    """The hub sends a listing, a redirect or an error without end -> refused after a bounded number of bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="has more than"):
            ask(hub, lambda to: to.endless(status, {"Location": "/elsewhere"}))
        most = ANSWER.size if status == 200 else ERROR_BYTES
        assert tracemalloc.get_traced_memory()[1] < 3 * most + 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [b"[" * 5_000_000, b'{"siblings": [' + b"{}," * 3_000_000 + b"{}]}", b'{"a":' * 1000 + b"1" + b"}" * 1000],
)
def test_an_answer_that_becomes_a_gigabyte_of_objects(hub: Any, body: bytes) -> None:
    """The hub sends megabytes of brackets -> refused before they are parsed."""
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="the hub's answer") as error:
            ask(hub, lambda to: to.whole(200, body))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body) + 8_000_000
    finally:
        tracemalloc.stop()
    assert not error.value.transient


def test_an_answer_that_unpacks_to_more(hub: Any) -> None:
    """The hub sends a few KB that unpack to 100 MB -> refused, and nothing is unpacked."""
    packed = gzip.compress(b" " * 100_000_000)
    with pytest.raises(SourceError, match="compressed"):
        ask(hub, lambda to: to.whole(200, packed, {"Content-Encoding": "gzip"}))


def test_every_program_asks_the_hub_through_the_bounds() -> None:
    """A module uses huggingface_hub's functions itself -> this test names it."""
    from graft.crdgen import ROOT

    own = ROOT / "operator/graft/artifacts/hub.py"
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("operator/graft", "trainer-image/graft_trainer", "server-image/graft_server")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*(from|import) huggingface_hub(?!\.errors)", line) and path != own
    ]
    assert found == []
    assert HfApi.__module__.startswith("huggingface_hub")
