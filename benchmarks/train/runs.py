"""Run every variant on the same machine, each in its own processes, and read the records of their clocks."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft_trainer.run.settings import SPINS
from testbed.objectstore import S3Server, s3_server

from benchmarks.train.recipe import REPOSITORY, Recipe

# All variants use this environment. GOMP_SPINCOUNT: with the default, idle threads take cores from working threads.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": SPINS, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
WITHIN = 0.2  # a kill comes up to so many seconds after the end of a step


@dataclass(frozen=True)
class Timeline:
    """The records of a clock, of all attempts of a run in order. Times are in seconds of the monotonic clock."""

    events: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Timeline":
        lines = path.read_text().splitlines() if path.exists() else []
        return cls([json.loads(line) for line in lines if line.endswith("}")])

    def _of(self, event: str) -> list[dict[str, Any]]:
        return [item for item in self.events if item["event"] == event]

    @property
    def steps_per_second(self) -> float:
        """The speed from the end of the first step, which is the warm-up, to the end of training."""
        return 1 / self._per_step("time")

    @property
    def cpu_per_step(self) -> float:
        """Seconds of processor time. Other work on the machine hardly changes it."""
        return self._per_step("cpu")

    def _per_step(self, clock: str) -> float:
        steps, end = self._of("step"), self._of("end")[-1]
        return (float(end[clock]) - float(steps[0][clock])) / (len(steps) - 1)

    @property
    def peak_bytes(self) -> int | None:
        """The peak of the GPU's memory in bytes, as torch's allocator counts it."""
        peak = self._of("end")[-1].get("peak")
        return None if peak is None else int(peak)

    @property
    def steps_done(self) -> int:
        """The number of steps in all attempts, including those that were lost."""
        return len(self._of("step"))

    @property
    def stalls(self) -> list[float]:
        """The seconds for which training waited for each checkpoint: from the end of its step to the callback
        on_save."""
        ended = {item["step"]: item["time"] for item in self._of("step")}
        return [item["time"] - ended[item["step"]] for item in self._of("saved")]

    @property
    def losses(self) -> dict[int, float]:
        """The loss by step. If a step was done twice, the last one counts."""
        return {item["step"]: item["loss"] for item in self._of("loss")}


def difference(one: Timeline, other: Timeline) -> float:
    """Return the largest difference between two loss curves. Raises ValueError if they do not have the same steps."""
    if one.losses.keys() != other.losses.keys() or not one.losses:
        raise ValueError(f"the curves have {len(one.losses)} and {len(other.losses)} steps")
    return max(abs(loss - other.losses[step]) for step, loss in one.losses.items())


class World:
    """An S3 server with the recipe's files, and a folder for the runs."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        self.folder = folder
        self.secret = server.secret_dir("graft", "bench/")
        self.store = S3Store(StorageConfig.from_dir(self.secret))
        self.store.create_bucket()
        self.numbers = itertools.count()

    def provide(self, recipe: Recipe) -> None:
        """Put the base model and the data where the job reads them: in a claim and in the store."""
        link = self.folder / "pvc" / "model"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(recipe.model)
        self.store.upload("bench/train.jsonl", Path(recipe.data))

    def plain(self, recipe: Recipe, script: str, save_steps: int | None = None) -> Timeline:
        """Run a plain script. With `save_steps`, it saves and uploads checkpoints synchronously."""
        folder = self._new_folder()
        recipe.write(folder / "recipe.json")
        saving = [str(save_steps), str(self.secret)] if save_steps else []
        command = ["-m", script, folder / "recipe.json", folder / "clock.jsonl", folder / "out", *saving]
        self._wait(self._start(command, folder, {}), folder)
        return self._read_and_remove(folder)

    def pod(
        self, recipe: Recipe, save_steps: int | None = None, kill: "Kill | None" = None, leave: bool = False
    ) -> Timeline:
        """Run the pod's two containers. With `kill`, the run is killed and started again, as the Job would do. With
        `leave`, it ends after the last step."""
        folder, number = self._new_folder(), next(self.numbers)
        (folder / "job.json").write_text(json.dumps(recipe.job(number, save_steps)))
        for attempt in itertools.count():
            environment = self._pod_environment(folder, f"bench-{number}-{attempt}")
            shutil.rmtree(folder / "work", ignore_errors=True)  # a new pod has a new emptyDir
            (folder / "work").mkdir()
            self._wait(self._start(["-m", "graft_trainer", "prepare"], folder, environment), folder)
            command = ["-m", "benchmarks.train.pod", folder / "clock.jsonl", *(["leave"] if leave else [])]
            process = self._start(command, folder, environment)
            if kill is not None and kill.end_attempt(process, folder / "clock.jsonl"):
                continue
            self._wait(process, folder)
            return self._read_and_remove(folder)
        raise AssertionError

    def _pod_environment(self, folder: Path, pod: str) -> dict[str, str]:
        return {
            "POD_NAME": pod,
            "GRAFT_JOB_FILE": str(folder / "job.json"),
            "GRAFT_STORAGE_DIR": str(self.secret),
            "GRAFT_PVC_DIR": str(self.folder / "pvc"),
            "GRAFT_WORK_DIR": str(folder / "work"),
            "GRAFT_TERMINATION_FILE": str(folder / "termination"),
        }

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _start(self, command: list[Any], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=REPOSITORY,
                env=dict(os.environ) | ENVIRONMENT | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        if code := process.wait():
            raise RuntimeError(f"exit code {code}:\n{(folder / 'log').read_text()[-6000:]}")

    def _read_and_remove(self, folder: Path) -> Timeline:
        found = Timeline.read(folder / "clock.jsonl")
        shutil.rmtree(folder)
        return found


@dataclass
class Kill:
    """The kills of a run. Each entry of `after` kills one attempt, so many steps after the attempt's start."""

    number: signal.Signals
    after: list[int]
    draw: random.Random  # of the moment within a step

    def end_attempt(self, process: subprocess.Popen[bytes], clock: Path) -> bool:
        """Kill the attempt. Return False if no kill is left, or if the attempt ended before the kill."""
        if not self.after:
            return False
        steps, before = self.after.pop(0), Timeline.read(clock).steps_done
        while process.poll() is None and Timeline.read(clock).steps_done < before + steps:
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, WITHIN))
        if process.poll() is not None:
            return False
        process.send_signal(self.number)
        process.wait()
        return True


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Yield a World with an S3 server and a folder. Both are removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="graft-bench-"))
    try:
        with s3_server() as server:
            yield World(server, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
