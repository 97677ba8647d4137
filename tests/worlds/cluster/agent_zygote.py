"""Start the agent's real process many times in a short time. Everything is imported once, and each start is a fork.

This program reads one JSON line per start: {"arguments": […], "log": path, "kill_at": n, "below": folder}. It answers with
the process id. With kill_at, SIGKILL ends the process just before its n-th call that changes something below the folder.
"""

import json
import os
import signal
import sys
from pathlib import Path

import boto3
from graft_server.agent import __main__ as agent

CHANGES = frozenset(
    {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree"}
)


def kill_at(count: int, folder: str) -> None:
    """Send SIGKILL at the count-th change below the folder. Truncation and fsync of an open file do not count."""
    left = count

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not set(str(arguments[1])) & set("wa+x"):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(order: dict[str, object]) -> int:
    """Fork the agent. Return its process id."""
    if pid := os.fork():
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["agent", *order["arguments"]]  # type: ignore[misc]
    if order.get("kill_at"):
        kill_at(int(str(order["kill_at"])), str(Path(str(order["below"]))))
    try:
        agent.main()
    finally:
        os._exit(70)  # not reached: main() ends the process itself


def main() -> None:
    boto3.client(
        "s3", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )  # boto3 reads its service models once, before the forks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        print(start(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
