"""The ranks of a run, started as the containers of its pods start them, but with a store in a folder and a tiny model.

Each process ends with the exit code and the termination message of `python -m graft_trainer train`. The processes are
forked from a server that has imported everything, because importing torch and transformers takes seconds.
"""

import gc
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.job import Pods
from graft.contracts.progress import Progress
from graft_trainer import train
from graft_trainer.__main__ import fail
from graft_trainer.loop.lean_trainer import LeanTrainer
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.processes import distributed
from graft_trainer.run.progress import ProgressReporter
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from worlds.checkpoints import ROOT, FolderStore, open_attempt, run_attempt
from worlds.trainer import make_job, ready

# Each of the two ranks takes half of the examples of the single process.
# A step has 4 examples, and the last step of an epoch has 2.
HALF = {"full": True, "per_device_train_batch_size": 1, "held_out": 5, "eval_steps": 6}


def out_of_memory() -> None:
    raise MemoryError


def main(store: FolderStore, root: Path, name: str, options: dict[str, Any]) -> int:
    rank, world = distributed.rank(), distributed.world_size()
    run = open_attempt(root, store, f"{name}-{rank}" if rank else name)
    if rank:
        run.progress = ProgressReporter(store, "", "", silent=True)
    run.interruption.listen(lambda: 99)
    run.progress.stage("Training")
    named = {"kill": lambda: os.kill(os.getpid(), 9), "term": lambda: os.kill(os.getpid(), 15), "memory": out_of_memory}
    events, measuring = (
        {at: named[what] for at, (who, what) in options.pop(name, {}).items() if who == rank}
        for name in ("events", "measuring")
    )
    distributed.ARRIVAL = options.pop("arrival", distributed.ARRIVAL)
    distributed.LOADING = options.pop("loading", distributed.LOADING)
    distributed.SILENCE = timedelta(seconds=options.pop("silence", distributed.SILENCE.total_seconds()))
    late, seconds, what = options.pop("late", (None, 0, None))
    joined = world > 1 and not options.pop("alone", False)
    try:
        if joined:
            distributed.join()
        if rank == late:  # a slow load of the model
            time.sleep(seconds)
            named.get(what, list)()
        attempt = run_attempt(
            root, store, name, run=run, events=events, measuring=measuring, world_size=world, **options
        )
        if attempt.ended is not None:
            raise attempt.ended
    except distributed.PartDone:
        return 0
    except BaseException as error:
        return fail(error, run, run.settings)
    assert attempt.learned is not None
    save_file({name: tensor.clone() for name, tensor in attempt.weights.items()}, root / f"{name}.safetensors")
    seen = {
        "curve": attempt.learned.curve,
        "tokens": attempt.learned.tokens,
        "evalLosses": attempt.learned.held_out_curve,
    }
    (root / f"{name}.json").write_text(json.dumps(seen))
    run.progress.close(10)
    return 0


def pipeline(root: Path, name: str, base: Path, changes: dict[str, Any]) -> int:
    """Run everything that a pod does after prepare. Each process has its own store.

    Rank 0 writes <name>.json. It holds the published curve and metrics. It also holds what exists when rank 0 starts to
    place the model: the number of training objects in memory and of final checkpoints in the store.
    """
    rank = distributed.rank()
    run, store = ready(root / f"{name}-{rank}", base, make_job(**changes))
    settle, left = train.settle, dict[str, int]()

    def look(*arguments: Any) -> None:
        kinds = {"shards": DTensor, "optimizers": torch.optim.Optimizer, "trainers": LeanTrainer}
        alive = gc.get_objects()
        left["final"] = sum("-final/rank-0000.json" in key for key in store.written)
        left.update({name: sum(issubclass(type(one), kind) for one in alive) for name, kind in kinds.items()})
        settle(*arguments)

    train.settle = look
    try:
        with run.cleanup:
            train_evaluate_publish(run)
    except BaseException as error:
        return fail(error, run, run.settings)
    finally:
        train.settle = settle
    run.progress.close(10)
    if rank == 0:
        report = json.loads((run.settings.adapter_dir / "report.json").read_text())
        seen = {"left": left, "curve": report["lossCurve"], "metrics": report["metrics"]}
        (root / f"{name}.json").write_text(json.dumps(seen))
    return 0


def start(
    store: Path, root: Path, name: str, rank: int, world: int, port: int, options: dict[str, Any]
) -> multiprocessing.Process:
    """Start one rank in a process. Its output goes to <root>/<name>-<rank>.log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worlds.ranks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's fork server imports only from there
        forkserver.ensure_running()
    process = context.Process(target=_run, args=(store, root, name, rank, world, port, options), daemon=True)
    process.start()
    return process  # type: ignore[return-value]


def _run(store: Path, root: Path, name: str, rank: int, world: int, port: int, options: dict[str, Any]) -> None:
    if world > 1:
        pods = Pods(nodes=world, first_host="127.0.0.1")
        own = {"JOB_COMPLETION_INDEX": str(rank), "GRAFT_RENDEZVOUS_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update(own | distributed.variables(pods, own))
    with (root / f"{name}-{rank}.log").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout, force=True
    )
    torch.set_num_threads(1)
    if "base" in options:
        code = pipeline(root, name, options["base"], options["job"])
    else:
        code = main(FolderStore(store), root, name, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Pair:
    """Two ranks that have trained together: their exit codes, their logs and their progress."""

    root: Path
    name: str
    codes: list[int | None]
    seconds_between: float

    def log(self, rank: int) -> str:
        return (self.root / f"{self.name}-{rank}.log").read_text()

    @property
    def progress(self) -> Progress:
        return Progress.model_validate_json(FolderStore(self.root / "store").get(f"{ROOT}{self.name}/progress.json"))


def run_pair(root: Path, name: str, events: dict[int, list[Any]] | None = None, **options: Any) -> Pair:
    """Run two ranks until both have ended.

    `events` maps a micro-batch to a rank and the event that happens to it. The option `measuring` does the same for
    batches of held-out examples.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root.mkdir(exist_ok=True)
    told = HALF | options | {"events": events or {}}
    processes = [start(root / "store", root, name, rank, 2, port, told) for rank in range(2)]
    ended: list[float] = []
    deadline = time.monotonic() + 240
    while len(ended) < 2 and time.monotonic() < deadline:
        done = sum(process.exitcode is not None for process in processes)
        ended += [time.monotonic()] * (done - len(ended))
        processes[0].join(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert len(ended) == 2, "\n".join((root / f"{name}-{rank}.log").read_text() for rank in range(2))
    return Pair(root, name, codes, ended[1] - ended[0])
