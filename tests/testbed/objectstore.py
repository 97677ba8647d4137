"""A real S3 server for tests: versitygw, which serves a folder."""

import contextlib
import secrets
import shutil
import signal
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.contracts.addresses import host_port

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
    address: str = "127.0.0.1"
    tls: Path | None = None  # the folder with server.crt, server.key and ca.crt, for HTTPS

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.tls else 'http'}://{host_port(self.address, self.port)}"

    @property
    def processes(self) -> Processes:
        return Processes(self.state, self.state / "logs")

    def start(self) -> None:
        """Start the server. A later start uses the same folder and port."""
        for folder in ("data", "iam", "sidecar"):
            (self.state / folder).mkdir(exist_ok=True)
        self.processes.start(
            "versitygw",
            [binary("versitygw"), "--port", host_port(self.address, self.port), "--health", "/health", "--quiet", "--iam-dir",
             self.state / "iam", *(["--keep-alive"] if self.keep_alive else []), *self._certificate(), "posix", "--sidecar", self.state / "sidecar", self.state / "data"],
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

    def _certificate(self) -> list[str | Path]:
        return ["--cert", self.tls / "server.crt", "--key", self.tls / "server.key"] if self.tls else []

    def _answers(self) -> bool:
        try:
            trust = ssl.create_default_context(cafile=self.tls / "ca.crt") if self.tls else None
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=2, context=trust) as answer:
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
