"""When each step ended, by the same callback in every variant: JSON lines with the monotonic clock, which all processes of a
machine share, and with the processor time of the process, all threads together."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Writes begin, step, saved, loss and end; each line at once, so that a killed run leaves what it did."""

    def __init__(self, path: str | Path, leave: bool = False) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.leave = leave  # end the process after the last step: what follows is not measured

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
