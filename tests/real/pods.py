"""Training and importing pods as processes, against a real S3 server. The base model and the data are real."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.artifacts.layout import EVENTS, PROGRESS, attempt_prefix
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.contracts.progress import Progress
from graft_trainer.run.settings import SPINS
from testbed.objectstore import S3Server
from testbed.shell import REPOSITORY
from worlds.buckets import play_operator

TENANT, BUCKET = "shop", "graft"
THREADS = 2
TABLE: dict[str, tuple[str, str]] = {}  # what was measured -> (Graft, plain script); printed after the tests
# The plain script gets the trainer's setting for idle threads, because the default one is much slower on a machine that
# runs other processes.
ENVIRONMENT = {"GOMP_SPINCOUNT": SPINS, "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Recipe:
    """What Graft and the plain script train alike."""

    model: Path
    data: Path  # the folder of wordnet.write_datasets()
    steps: int
    held_out: int  # examples
    batch: int = 4
    rank: int = 8
    alpha: int = 16
    max_length: int = 104  # tokens: about the longest example
    learning_rate: float = 5e-4
    warmup_steps: int = 2
    seed: int = 42

    def job(self, version: str, evaluation: dict[str, Any]) -> dict[str, Any]:
        """Return job.json as the operator writes it."""
        return {
            "job": {"name": "classes", "namespace": TENANT, "uid": version},
            "tenant": TENANT,
            "baseModel": {"name": "smollm2", "uri": "pvc://model"},
            "dataset": {
                "train": {"uri": f"s3://{BUCKET}/{TENANT}/train.jsonl"},
                "eval": {"uri": f"s3://{BUCKET}/{TENANT}/heldout.jsonl"},
            },
            "method": {"lora": {"rank": self.rank, "alpha": self.alpha, "targetModules": "all-linear"}},
            "training": {
                "maxSteps": self.steps,
                "perDeviceTrainBatchSize": self.batch,
                "gradientAccumulationSteps": 1,
                "maxLength": self.max_length,
                "learningRate": self.learning_rate,
                "warmupSteps": self.warmup_steps,
                "loggingSteps": 10,
                "evalSteps": self.steps // 2,
                "seed": self.seed,
            },
            "evaluation": evaluation,
            "output": {"adapter": "classes", "version": version},
            "recipe": "sha256:real",
        }

    def plain(self) -> dict[str, Any]:
        """Return the same for plain.py."""
        return {
            "threads": THREADS, "model": str(self.model), "seed": self.seed, "rank": self.rank, "alpha": self.alpha,
            "steps": self.steps, "batch": self.batch, "learningRate": self.learning_rate,
            "warmupSteps": self.warmup_steps, "train": str(self.data / "train.jsonl"),
            "heldOut": str(self.data / "heldout.jsonl") if self.held_out else None,
        }  # fmt: skip


@dataclass
class Seen:
    """What a user saw of a run while it was running."""

    progress: Progress
    etas: list[tuple[float, Progress]]  # (seconds of the monotonic clock, each progress.json)
    peak: int  # bytes: the peak of the process's resident memory
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """The stages in the order in which they were seen, each once in a row."""
        shown: list[str] = []
        for _, progress in self.etas:
            if shown[-1:] != [progress.stage]:
                shown.append(progress.stage)
        return shown

    def eta_error(self, share: float) -> float:
        """Return the error of the remaining time of Training, when `share` of its steps were done, as a share of the
        real remaining time."""
        end = next(at for at, progress in self.etas if progress.stage == "Evaluating")
        at, told = next(
            (at, progress.eta_seconds)
            for at, progress in self.etas
            if progress.eta_seconds is not None and progress.step >= share * progress.total_steps
        )
        return told / (end - at) - 1


class Pods:
    """The pods of one tenant, one after the other."""

    def __init__(self, server: S3Server, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.secret = server.secret_dir(BUCKET, f"{TENANT}/")
        self.store = S3Store(StorageConfig.from_dir(self.secret))
        self.store.create_bucket()
        for name in ("train", "heldout"):
            self.store.upload(f"{TENANT}/{name}.jsonl", recipe.data / f"{name}.jsonl")
        (folder / "pvc").mkdir()
        (folder / "pvc" / "model").symlink_to(recipe.model)

    def train(self, job: dict[str, Any]) -> Seen:
        """Run prepare and train. Return what a user sees."""
        version = job["output"]["version"]
        place = self._place(version, job)
        self._run("prepare", place)
        process = self._start(["-m", "graft_trainer", "train"], place)
        prefix, seen, peak = attempt_prefix(TENANT, job["job"]["uid"], version), [], 0
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            try:
                found = Progress.read(self.store.get(prefix + PROGRESS, most=Progress.limits.size))
            except StoreError:
                found = None
            if found is not None and (not seen or found != seen[-1][1]):
                seen.append((time.monotonic(), found))
            time.sleep(0.2)
        self._check(process.returncode, place)
        play_operator(self.store, TENANT, job["job"]["uid"])
        events = [json.loads(line) for line in self.store.get(prefix + EVENTS).splitlines()]
        last = Progress.read(self.store.get(prefix + PROGRESS, most=Progress.limits.size))
        return Seen(last, seen, peak, events)

    def step_times(self, job: dict[str, Any]) -> tuple[list[float], list[float]]:
        """Train without evaluating. Return the wall-clock time and the processor time at the end of each step."""
        place = self._place(job["output"]["version"], job)
        self._run("prepare", place)
        clock = place / "clock.jsonl"
        self._check(self._start(["-m", "benchmarks.train.pod", str(clock), "leave"], place).wait(), place)
        steps = [line for line in map(json.loads, clock.read_text().splitlines()) if line["event"] == "step"]
        return [step["time"] for step in steps], [step["cpu"] for step in steps]

    def importing(self, adapter: Path, version: str) -> None:
        """Import the adapter in this folder, as an Adapter with spec.import does."""
        source = f"{TENANT}/elsewhere"
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            self.store.upload(f"{source}/{name}", adapter / name)
        file = {
            "job": {"name": "imported", "namespace": TENANT, "uid": version},
            "tenant": TENANT,
            "baseModel": {"name": "smollm2", "uri": "pvc://model"},
            "output": {"adapter": "imported", "version": version},
            "method": "lora",
            "source": f"s3://{BUCKET}/{source}/",
        }
        self._run("import", self._place(version, file))
        play_operator(self.store, TENANT, version)

    def download(self, adapter: str, version: str) -> Path:
        """Copy a published version to a folder, as the agent does."""
        target = self.folder / f"{adapter}-{version}"
        target.mkdir()
        prefix = f"{TENANT}/adapters/{adapter}/{version}/"
        for item in self.store.objects(prefix):
            self.store.download(item, target / item.key.removeprefix(prefix), BUCKET)
        return target

    def plain(self, recipe: Recipe, name: str) -> tuple[Path, dict[str, Any]]:
        """Run the plain script. Return the folder of its adapter, and its result."""
        output = self.folder / name
        output.mkdir()
        (output / "recipe.json").write_text(json.dumps(recipe.plain()))
        command = [sys.executable, "-m", "real.plain", output / "recipe.json", output]
        with (output / "log").open("w") as log:
            environment = dict(os.environ) | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY / "tests")}
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        assert done.returncode == 0, (output / "log").read_text()[-4000:]
        return output, json.loads((output / "result.json").read_text())

    def _place(self, version: str, file: dict[str, Any]) -> Path:
        place = self.folder / f"pod-{version}"
        (place / "work").mkdir(parents=True)
        (place / "job.json").write_text(json.dumps(file))
        return place

    def _start(self, command: list[str], place: Path) -> subprocess.Popen[bytes]:
        paths = {
            "POD_NAME": place.name.removeprefix("pod-"),
            "GRAFT_JOB_FILE": str(place / "job.json"),
            "GRAFT_STORAGE_DIR": str(self.secret),
            "GRAFT_PVC_DIR": str(self.folder / "pvc"),
            "GRAFT_WORK_DIR": str(place / "work"),
            "GRAFT_TERMINATION_FILE": str(place / "termination"),
            "GRAFT_PROGRESS_INTERVAL": "0.5",
        }
        with (place / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY,
                env=dict(os.environ) | ENVIRONMENT | paths, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _run(self, command: str, place: Path) -> None:
        self._check(self._start(["-m", "graft_trainer", command], place).wait(), place)

    def _check(self, code: int, place: Path) -> None:
        assert code == 0, (place / "log").read_text()[-6000:]


def _peak(pid: int) -> int:
    """Return the peak of a process's resident memory so far, in bytes. 0 if it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
