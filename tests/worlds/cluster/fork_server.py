"""Starts the engine's and the agent's own main() many times in a short time: everything is imported once, each start is a fork.

Reads one JSON line per start: {"program": "engine" or "agent", "arguments": […], "environment": {…}, "log": path}; answers with
the process id. The file that KUBECONFIG names when this starts is read by each agent at its own start.
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
    """The parent's side."""

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
        """Starts a program; its process id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"program": program, "arguments": arguments, "environment": environment, "log": str(log)}
        with self._one:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # it may still import; what it forked is ended by who asked for it
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
    from transformers.models.llama import modeling_llama  # noqa: F401 - what the engine imports when it loads its model

    # boto3 reads its models at the first client.
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    mains = {"engine": engine.main, "agent": agent.main}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        order = json.loads(line)
        print(_start(order, mains[order["program"]]), flush=True)


if __name__ == "__main__":
    _serve()
