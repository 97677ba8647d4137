"""Run several processes in one pod, one per GPU: start them, pass SIGTERM on to them, and report why they ended.

torch's elastic launcher is not used. It kills processes 30 s after SIGTERM, which is too soon for a checkpoint. Its
exit code does not show how the processes ended.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from graft.contracts.job import Pods
from graft.contracts.progress import EXIT_CODES, Reason, Termination

from graft_trainer.processes import distributed
from graft_trainer.run.failures import write_termination
from graft_trainer.run.interruption import LONGEST, Interruption
from graft_trainer.run.settings import Settings

log = logging.getLogger(__name__)
STRAGGLERS = 30.0  # seconds for the other processes to notice that one has failed
# Reasons that may only follow from another process's failure. If a pod's processes ended for several reasons, a reason
# that is not in this list is reported, else the first of this list.
CONSEQUENCES = (Reason.INTERRUPTED, Reason.COMMUNICATION_FAILED, Reason.PEER_LOST)
GENTLE = {EXIT_CODES[reason] for reason in (Reason.INTERRUPTED, Reason.PEER_LOST)}


@dataclass(frozen=True)
class End:
    """How a process ended."""

    code: int
    why: Termination | None  # None: it left no message
    by_launcher: bool = False  # this launcher killed it, because another process had ended


def launch(pods: Pods, settings: Settings, interruption: Interruption) -> int:
    """Run this pod's `train` processes until they end. Return the pod's exit code."""
    files = [settings.work_dir / f"termination-{local}" for local in range(pods.processes_per_node)]
    processes = []
    for local, file in enumerate(files):
        file.touch()
        own = {"GRAFT_TERMINATION_FILE": str(file)}
        environment = dict(os.environ) | distributed.variables(pods, os.environ, local) | own
        processes.append(subprocess.Popen([sys.executable, "-m", "graft_trainer", "train"], env=environment))
    with interruption.deferred():
        ends = _wait(processes, files, interruption)
    log.info("the pod's processes ended with %s", [end.code for end in ends])
    code, cause = worst(ends)
    if cause is not None:
        write_termination(settings.termination_file, cause)
    return code


def worst(ends: list[End]) -> tuple[int, Termination | None]:
    """Return the pod's exit code and message (PURE): those of the process that failed by itself. `ends` are in the
    order in which the processes ended."""
    failed = [end for end in ends if end.code != 0]
    if not failed:
        return 0, None
    told = [(end.code, end.why) for end in failed if end.why is not None]
    found = min(told, key=lambda one: _by_itself(one[1].reason), default=None)
    if found is not None and found[1].reason not in (Reason.COMMUNICATION_FAILED, Reason.PEER_LOST):
        return found
    # A killed process left no message, and the other processes only report that they lost it. A process that was
    # aborted after another one had ended does not count: its GPU waited for that one until torch's watchdog aborted the
    # process.
    silent = [
        end.code
        for position, end in enumerate(failed)
        if end.why is None and not end.by_launcher and not (end.code == -signal.SIGABRT and position > 0)
    ]
    if not silent and found is not None:
        return found
    number = silent[0] if silent else failed[0].code
    how = f"was killed by signal {-number}" if number < 0 else f"ended with code {number}"
    why = Termination(
        reason=Reason.MEMORY_EXCEEDED if number == -signal.SIGKILL else Reason.INTERNAL_ERROR,
        message=f"One of the pod's processes {how}.",
        remedy="Read the last lines of its log. The kernel sends signal 9 when the pod's memory is used up: if it happens "
        "again, raise spec.resources.limits.memory.",
    )
    return EXIT_CODES[why.reason], why


def _by_itself(reason: Reason) -> int:
    return CONSEQUENCES.index(reason) + 1 if reason in CONSEQUENCES else 0


def _wait(processes: list[subprocess.Popen[bytes]], files: list[Path], interruption: Interruption) -> list[End]:
    """Wait until all processes have ended. Return how they ended, in the order in which they ended."""
    passed_on, killed, deadline = False, False, float("inf")
    running, ends = dict(zip(processes, files, strict=True)), []
    while running:
        if interruption.wanted and not passed_on:
            passed_on = True
            _signal(processes, signal.SIGTERM)
        for process, file in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[process]
            ends.append(End(code, _termination(file), by_launcher=killed and code == -signal.SIGKILL))
            if code:
                # If a process was interrupted or lost a peer, the other processes get enough time for their
                # checkpoints.
                patience = LONGEST if code in GENTLE else STRAGGLERS
                deadline = min(deadline, time.monotonic() + patience)
        if running and not killed and time.monotonic() > deadline:
            killed = True
            _signal(processes, signal.SIGKILL)
        time.sleep(0.1)
    return ends


def _signal(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _termination(file: Path) -> Termination | None:
    text = file.read_text()
    return Termination.model_validate_json(text) if text else None
