"""Processes that outlive the program that started them.

A process is identified by its pid and its start time, so that another process with the same pid is never ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from testbed.shell import Failed, tail


def start_time(pid: int) -> str | None:
    """Return field 22 of /proc/<pid>/stat, or None if the process does not exist. It differs when a pid is used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


class Processes:
    """The processes of one cluster, which a file lists."""

    def __init__(self, state: Path, logs: Path) -> None:
        self._file = state / "processes.json"
        self.logs = logs

    def _read(self) -> dict[str, dict[str, str]]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def start(
        self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None, netns: str | None = None
    ) -> None:
        """Start a program in its own session, with its output in a log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # nsenter is used because `ip netns exec` hides the cgroup mounts.
        prefix = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        full = [*prefix, *(str(part) for part in command)]
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                full, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip
        # The variables are not kept, because some are secrets.
        entry = {"pid": str(process.pid), "start": start_time(process.pid) or "", "command": json.dumps(full)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._read() | {name: entry}, indent=1))

    def pid(self, name: str) -> int:
        """Return the id of a process that runs."""
        self.require(name)
        return int(self._read()[name]["pid"])

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process that runs."""
        os.kill(self.pid(name), number)

    def start_again(self, name: str) -> None:
        """Start a program that was killed, with the same command."""
        self.start(name, json.loads(self._read()[name]["command"]))

    def alive(self, name: str) -> bool:
        """Return whether the process that was started under this name still runs."""
        entry = self._read().get(name)
        return entry is not None and start_time(int(entry["pid"])) == entry["start"]

    def require(self, name: str) -> None:
        """Check that a process still runs. Raises Failed with the end of its log if it ended."""
        if not self.alive(name):
            log = self.logs / f"{name}.log"
            raise Failed(f"{name} ended unexpectedly. The log is {log}. Its last lines:\n{tail(log)}")

    def names(self) -> list[str]:
        """Return the names of the started processes, the first started first."""
        return list(self._read())

    def stop(self, name: str, timeout: float = 10) -> None:
        """End one process with SIGTERM. If it does not end in time, send SIGKILL."""
        entry = self._read().get(name)
        if entry is None:
            return
        pid = int(entry["pid"])
        for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
            if start_time(pid) != entry["start"]:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while start_time(pid) == entry["start"] and time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError, OSError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(0.05)
        rest = self._read()
        rest.pop(name, None)
        self._file.write_text(json.dumps(rest, indent=1))
