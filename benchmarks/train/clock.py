"""Record the end of each step, with the same callback in every variant.

The records are JSON lines. They have the time of the monotonic clock, which all processes of a machine share, and the
processor time of the process with all its threads, both in seconds.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Write the events begin, step, saved, loss and end. Each line is written at once, so a killed run keeps its
    records."""

    def __init__(self, path: str | Path, leave: bool = False) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.leave = leave  # end the process after the last step, because the rest is not measured

    def _write(self, event: str, step: int, **more: Any) -> None:
        record = {"event": event, "step": step, "time": time.monotonic(), "cpu": time.process_time()} | more
        os.write(self.file, json.dumps(record).encode() + b"\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("begin", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("step", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write("saved", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._write("loss", state.global_step, loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self._write("end", state.global_step, peak=peak)
        if self.leave:
            os._exit(0)
