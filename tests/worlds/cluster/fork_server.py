"""Start the main() of the engine, the agent and the operator many times in a short time. Each start is a fork after all
imports.

This program gets the names of the programs as arguments. It reads one JSON line per start: {"program": name,
"arguments": […], "environment": {…}, "log": path, "clock": seconds}. It answers with the process id. Each agent and
operator reads, at its own start, the file that KUBECONFIG named when this program started. `clock` is how far the clock
of the started program is ahead.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from threading import Lock
from typing import Any


class ForkServer:
    """The test's side: it starts this file as a process and sends it the orders."""

    def __init__(self, kubeconfig: Path, programs: tuple[str, ...] = ("engine", "agent")) -> None:
        self._one = Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, *programs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KUBECONFIG": str(kubeconfig), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def start(
        self, program: str, arguments: list[str], environment: dict[str, str], log: Path, clock: float = 0
    ) -> int:
        """Start a program. Return its process id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {
            "program": program,
            "arguments": arguments,
            "environment": environment,
            "log": str(log),
            "clock": clock,
        }
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
    if order["clock"]:
        _shift_clock(order["clock"])
    sys.argv = [order["program"], *order["arguments"]]
    try:
        main()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _shift_clock(seconds: float) -> None:
    """Shift the clock by which the operator writes and compares times. Its signatures of requests to the store, and its
    tokens, keep the right time: a store refuses others."""
    from graft import status

    wall = time.time
    time.time = lambda: wall() + seconds

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    status.datetime = Shifted  # type: ignore[misc]


def _main_of(program: str) -> Any:
    if program == "operator":
        from graft import __main__ as operator
        from graft import handlers  # noqa: F401 - the program imports it at its start

        return operator.main
    if program == "agent":
        from graft_server.agent import __main__ as agent

        return agent.main
    from graft_server.engine import __main__ as engine
    from transformers.models.llama import modeling_llama  # noqa: F401 - the engine imports it when it loads its model

    return engine.main


def _serve(programs: list[str]) -> None:
    import boto3

    mains = {program: _main_of(program) for program in programs}
    # The first client makes boto3 read its service models.
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        order = json.loads(line)
        print(_start(order, mains[order["program"]]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
