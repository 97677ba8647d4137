"""Several processes in one pod, one per GPU: starts them, passes SIGTERM on, and says why they ended.

torch's elastic launcher is not used: it kills what has not ended 30 s after SIGTERM, which is too soon for a checkpoint,
and its exit code is its own.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from graft.contracts import EXIT_CODES, Pods, Reason, Termination

from graft_trainer import distributed
from graft_trainer.failures import write_termination
from graft_trainer.interruption import LONGEST, Interruption
from graft_trainer.settings import Settings

log = logging.getLogger(__name__)
STRAGGLERS = 30.0  # seconds for the others to see by themselves that one has failed
# What is told of a pod whose processes ended for several reasons: what caused the others comes first.
CONSEQUENCES = (Reason.INTERRUPTED, Reason.PEER_LOST)
GENTLE = {EXIT_CODES[reason] for reason in CONSEQUENCES}


def launch(pods: Pods, settings: Settings, interruption: Interruption) -> int:
    """Run this pod's processes of `train` to their end; the pod's exit code."""
    files = [settings.work_dir / f"termination-{local}" for local in range(pods.processes_per_node)]
    processes = []
    for local, file in enumerate(files):
        file.touch()
        own = {"GRAFT_TERMINATION_FILE": str(file)}
        environment = dict(os.environ) | distributed.variables(pods, os.environ, local) | own
        processes.append(subprocess.Popen([sys.executable, "-m", "graft_trainer", "train"], env=environment))
    with interruption.deferred():
        codes = _wait(processes, interruption)
    log.info("the pod's processes ended with %s", codes)
    code, cause = worst(codes, [_termination(file) for file in files])
    if cause is not None:
        write_termination(settings.termination_file, cause)
    return code


def worst(codes: list[int], told: list[Termination | None]) -> tuple[int, Termination | None]:
    """The pod's exit code and message from those of its processes: of the one that failed by itself (PURE)."""
    failed = [(code, why) for code, why in zip(codes, told, strict=True) if code != 0]
    if not failed:
        return 0, None

    def by_itself(one: tuple[int, Termination | None]) -> int:
        _, why = one
        return -1 if why is None else CONSEQUENCES.index(why.reason) + 1 if why.reason in CONSEQUENCES else 0

    code, why = min((one for one in failed if one[1] is not None), key=by_itself, default=failed[0])
    # One that was killed left no message, and the others only say that it is gone.
    killed = [code for code, why in failed if why is None]
    if killed and (why is None or why.reason == Reason.PEER_LOST):
        number = killed[0]
        how = f"was killed by signal {-number}" if number < 0 else f"ended with code {number}"
        why = Termination(
            reason=Reason.MEMORY_EXCEEDED if number == -signal.SIGKILL else Reason.INTERNAL_ERROR,
            message=f"One of the pod's processes {how}.",
            remedy="The log has what it said last. Signal 9 is the kernel's when the pod's memory is used up: raise "
            "resources.limits.memory if it comes again.",
        )
        code = EXIT_CODES[why.reason]
    return code, why


def _wait(processes: list[subprocess.Popen[bytes]], interruption: Interruption) -> list[int]:
    passed_on, deadline = False, float("inf")
    while any(process.poll() is None for process in processes):
        if interruption.wanted and not passed_on:
            passed_on = True
            _signal(processes, signal.SIGTERM)
        for process in processes:
            if process.returncode:
                # One that was only asked to end leaves the others the time for their checkpoints.
                patience = LONGEST if process.returncode in GENTLE else STRAGGLERS
                deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            _signal(processes, signal.SIGKILL)
        time.sleep(0.1)
    return [process.returncode for process in processes]


def _signal(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _termination(file: Path) -> Termination | None:
    text = file.read_text()
    return Termination.model_validate_json(text) if text else None
