"""A real S3 server for tests: versitygw, which serves a folder."""

import contextlib
import secrets
import shutil
import signal
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.binaries import binary
from testbed.controlplane import free_port
from testbed.processes import Processes
from testbed.shell import tail, wait_for


@dataclass
class S3Server:
    """One server. `access_key` and `secret_key` are the root key."""

    state: Path
    port: int
    access_key: str
    secret_key: str
    keep_alive: bool = False  # whether connections stay open after an answer, as those of S3 do

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def processes(self) -> Processes:
        return Processes(self.state, self.state / "logs")

    def start(self) -> None:
        """Start the server. A later start uses the same folder and port."""
        for folder in ("data", "iam", "sidecar"):
            (self.state / folder).mkdir(exist_ok=True)
        self.processes.start(
            "versitygw",
            [binary("versitygw"), "--port", f"127.0.0.1:{self.port}", "--health", "/health", "--quiet", "--iam-dir",
             self.state / "iam", *(["--keep-alive"] if self.keep_alive else []), "posix", "--sidecar", self.state / "sidecar", self.state / "data"],
            env={"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key},
        )  # fmt: skip
        wait_for(self._answers, 20, "the S3 server answers", lambda: tail(self.state / "logs/versitygw.log"))

    def stop(self) -> None:
        self.processes.stop("versitygw")

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Let the server accept connections during the block, and answer none."""
        self.processes.signal("versitygw", signal.SIGSTOP)
        try:
            yield
        finally:
            self.processes.signal("versitygw", signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=2) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def secret_dir(self, bucket: str, prefix: str = "") -> Path:
        """Write a folder like the mounted Secret graft-storage, with the root key. Return the folder."""
        folder = self.state / "secret"
        folder.mkdir(exist_ok=True)
        values = {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "bucket": bucket,
            "prefix": prefix,
            "access-key-id": self.access_key,
            "secret-access-key": self.secret_key,
        }
        for name, value in values.items():
            (folder / name).write_text(value)
        return folder


@contextlib.contextmanager
def s3_server(*, keep_alive: bool = False) -> Iterator[S3Server]:
    """Run a server with its own folder during the block. Delete both afterwards."""
    state = Path(tempfile.mkdtemp(prefix="graft-s3-"))
    server = S3Server(state, free_port(), "root", secrets.token_hex(16), keep_alive)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(state, ignore_errors=True)
