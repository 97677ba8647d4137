"""Processes that outlive the program that started them, and are ended by id: pid and start time, so never somebody else's."""

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
    """Field 22 of /proc/<pid>/stat: two processes that share a pid never share it, too. None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


class Processes:
    """The processes of one cluster, in a file."""

    def __init__(self, state: Path, logs: Path) -> None:
        self._file = state / "processes.json"
        self.logs = logs

    def _read(self) -> dict[str, dict[str, str]]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def start(
        self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None, netns: str | None = None
    ) -> None:
        """Start a program in a session of its own, its output in a log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # nsenter, not `ip netns exec`: that hides the cgroup mounts.
        prefix = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, *(str(part) for part in command)], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip
        entry = {"pid": str(process.pid), "start": start_time(process.pid) or ""}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._read() | {name: entry}, indent=1))

    def alive(self, name: str) -> bool:
        """Whether a process that we started still runs."""
        entry = self._read().get(name)
        return entry is not None and start_time(int(entry["pid"])) == entry["start"]

    def require(self, name: str) -> None:
        """Failed with the end of its log when a process is gone."""
        if not self.alive(name):
            log = self.logs / f"{name}.log"
            raise Failed(f"{name} ended; the log is {log}, its end:\n{tail(log)}")

    def names(self) -> list[str]:
        """All that were started."""
        return list(self._read())

    def stop(self, name: str, timeout: float = 10) -> None:
        """End one: SIGTERM, then SIGKILL."""
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
