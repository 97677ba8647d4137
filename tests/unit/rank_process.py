"""One process of a run, as the pod's container starts it, but with a store in a folder and a model made on the spot.

It ends with the exit code and the termination message of `python -m graft_trainer train`. Processes are forked from a
server that has imported everything, for torch and transformers take seconds to load.
"""

import json
import logging
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_world import FolderStore, open_attempt, run_attempt
from graft.contracts import Pods
from graft_trainer import distributed
from graft_trainer.__main__ import fail
from graft_trainer.progress import ProgressReporter
from safetensors.torch import save_file


def out_of_memory() -> None:
    raise MemoryError


def main(store: FolderStore, root: Path, name: str, options: dict[str, Any]) -> int:
    rank, world = distributed.rank(), distributed.world_size()
    run = open_attempt(root, store, f"{name}-{rank}" if rank else name)
    if rank:
        run.progress = ProgressReporter(store, "", "", silent=True)
    run.interruption.listen(lambda: 99)
    run.progress.stage("Training")
    events = {int(at): what for at, what in options.pop("events", {}).items() if what[0] == rank}
    named = {"kill": lambda: os.kill(os.getpid(), 9), "term": lambda: os.kill(os.getpid(), 15), "memory": out_of_memory}
    happening = {at: named[what] for at, (_, what) in events.items()}
    distributed.ARRIVAL = options.pop("arrival", distributed.ARRIVAL)
    joined = world > 1 and not options.pop("alone", False)
    try:
        if joined:
            distributed.join()
        attempt = run_attempt(root, store, name, run=run, events=happening, world_size=world, **options)
        if attempt.ended is not None:
            raise attempt.ended
    except distributed.PartDone:
        return 0
    except BaseException as error:
        return fail(error, run, run.settings)
    assert attempt.watch is not None
    save_file({name: tensor.clone() for name, tensor in attempt.weights.items()}, root / f"{name}.safetensors")
    seen = {"curve": attempt.watch.curve, "tokens": attempt.watch.tokens, "evalLoss": attempt.watch.last_eval_loss}
    (root / f"{name}.json").write_text(json.dumps(seen))
    run.progress.close(10)
    return 0


def start(
    store: Path, root: Path, name: str, rank: int, world: int, port: int, options: dict[str, Any]
) -> multiprocessing.Process:
    """A process of its own; its output goes to <root>/<name>-<rank>.log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_process"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server of Python 3.11 has no other path
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
    code = main(FolderStore(store), root, name, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
