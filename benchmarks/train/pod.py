"""Run the training pod's second container, python -m graft_trainer train, with the StepClock.

python -m benchmarks.train.pod CLOCK.jsonl [leave] needs the environment that World.pod of runs.py sets. With leave, it
ends after the last step.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import graft_trainer.__main__ as container


def with_clock(
    path: str, leave: bool, stage: Callable[[str], Callable[[Any], None]]
) -> Callable[[str], Callable[[Any], None]]:
    def clocked(command: str) -> Callable[[Any], None]:
        run_stage = stage(command)

        def run(attempt: Any) -> None:
            # Import only here, because the container must set the libraries' environment first.
            from transformers import trainer

            from benchmarks.train.clock import StepClock

            trainer.DEFAULT_CALLBACKS.append(StepClock(path, leave))
            run_stage(attempt)

        return run

    return clocked


if __name__ == "__main__":
    container.stage = with_clock(sys.argv[1], sys.argv[2:] == ["leave"], container.stage)  # type: ignore[assignment]
    code = container.main(["train"])
    sys.stdout.flush()
    os._exit(code)
