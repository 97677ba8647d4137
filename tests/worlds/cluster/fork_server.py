"""Start the main() of the engine and of the agent many times in a short time. Each start is a fork after all imports.

This program reads one JSON line per start: {"program": "engine" or "agent", "arguments": […], "environment": {…},
"log": path}. It answers with the process id. Each agent reads, at its own start, the file that KUBECONFIG named when this
program started.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any


class ForkServer:
    """The test's side: it starts this file as a process and sends it the orders."""

    def __init__(self, kubeconfig: Path) -> None:
        self._one = Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KUBECONFIG": str(kubeconfig), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def start(self, program: str, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        """Start a program. Return its process id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"program": program, "arguments": arguments, "environment": environment, "log": str(log)}
        with self._one:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # it may still be importing; each caller ends the processes that it started
        self._process.wait(10)


def _start(order: dict[str, Any], main: Any) -> int:
    if pid := os.fork():
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    sys.argv = [order["program"], *order["arguments"]]
    try:
        main()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _serve() -> None:
    import boto3
    from graft_server.agent import __main__ as agent
    from graft_server.engine import __main__ as engine
    from transformers.models.llama import modeling_llama  # noqa: F401 - the engine imports it when it loads its model

    # The first client makes boto3 read its service models.
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    mains = {"engine": engine.main, "agent": agent.main}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        order = json.loads(line)
        print(_start(order, mains[order["program"]]), flush=True)


if __name__ == "__main__":
    _serve()
