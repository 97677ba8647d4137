"""The ranks of a run: which rank this process is, how the ranks find each other, and how they exchange values.

There is one process per GPU, or one per pod without GPUs. The environment variables are torchrun's, so torch,
accelerate and transformers find what they expect. Values are exchanged on the CPUs, over gloo or the TCP store. They
never wait for a GPU.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from graft.contracts.addresses import host_port
from graft.contracts.job import RENDEZVOUS_PORT, Pods
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure, connection_ended

log = logging.getLogger(__name__)
ARRIVAL = 900.0  # seconds for all ranks to start: a pod may have to wait for a node and pull the image
LOADING = 3600.0  # seconds: rank 0 may read a large model for all ranks
SILENCE = timedelta(minutes=5)  # a rank that does not answer for this long is treated as lost
TOKENISING = 3 * 3600.0  # seconds for the pod's first process to tokenise, enough for about twenty million examples
HEARING = 10.0  # seconds that rank 0 waits for the other ranks to read that the run is done
LAST_WORD = 5.0  # seconds for a failing process to inform the other ranks
RAISING = 15.0  # seconds for the main thread to raise NCCL's error itself; torch aborts the process after 60 s
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PartDone(BaseException):
    """This rank's part of the run is done, and rank 0 continues alone. Not an Exception, because nothing has failed."""


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among all processes of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process within its pod, from 0. It is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this process is rank 0, which reports, evaluates and publishes."""
    return rank() == 0


def variables(pods: Pods, env: Mapping[str, str], local: int = 0) -> dict[str, str]:
    """Return torchrun's variables for the `local`-th process of this pod; none if the run has a single process
    (PURE)."""
    world, node = pods.nodes * pods.processes_per_node, int(env.get("JOB_COMPLETION_INDEX", "0"))
    if world == 1:
        return {}
    return {
        "RANK": str(node * pods.processes_per_node + local),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(pods.processes_per_node),
        "MASTER_ADDR": pods.first_host or "127.0.0.1",
        "MASTER_PORT": env.get("GRAFT_RENDEZVOUS_PORT", str(RENDEZVOUS_PORT)),
    }


class Group:
    """The process group, and the TCP store at rank 0 through which the ranks found each other."""

    def __init__(self) -> None:
        self.store: Any = None
        self.control: Any = None  # a gloo group, even if the GPUs use NCCL
        self.told = 0
        self.ended = 0
        self.give_up: Callable[[BaseException], int] | None = None
        self.told_pod = 0


_group = Group()


def joined() -> bool:
    """Return whether this process is in a process group now."""
    return _group.control is not None


def listen(give_up: Callable[[BaseException], int]) -> None:
    """Set `give_up`: it reports why the process ends and returns the exit code if the main thread is stuck in a GPU
    call."""
    _group.give_up = give_up


def join() -> None:
    """Wait for the other ranks and form the process group. Raises Failure(PeersMissing) if they do not start within
    ARRIVAL."""
    import torch
    from torch import distributed

    deadline = time.monotonic() + ARRIVAL
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    log.info("waiting for the other pods: process %d of %d, rank 0 is at %s:%d", rank(), world_size(), host, port)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # otherwise accelerate takes all cores
    if not is_main():
        _reach(host, port, deadline)
    _group.store = distributed.TCPStore(
        "localhost" if is_main() else host, port, is_master=is_main(), wait_for_workers=False, timeout=SILENCE
    )
    # Only rank 0 has a deadline here, so that a failed start uses one retry: rank 0's end closes the store for all ranks.
    here = _all_at("arrived", deadline if is_main() else float("inf"))
    if here < world_size():
        raise _alone(f"{here} of {world_size()} processes connected within {ARRIVAL / 60:.0f} minutes")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=distributed.PrefixStore("group", _group.store),
        rank=rank(),
        world_size=world_size(),
        timeout=SILENCE,
    )
    _group.control = distributed.new_group(backend="gloo", timeout=SILENCE)
    if cuda:
        threading.Thread(target=_watch_nccl, args=(_nccl_error,), name="nccl", daemon=True).start()
    _group.ended = _group.store.add("ended", 0)  # processes that were replaced while the other ranks waited
    log.info("all %d processes are connected", world_size())


def loaded() -> None:
    """Wait until every rank has loaded its model and data. A rank that reads for the other ranks takes much longer.

    Raises Failure(PeerLost) if another rank ends meanwhile. Raises Failure(CommunicationFailed) if not all ranks are
    done within LOADING.
    """
    if joined() and (here := _all_at("loaded", time.monotonic() + LOADING, or_ended=True)) < world_size():
        raise Failure(
            Reason.COMMUNICATION_FAILED,
            f"Only {here} of {world_size()} processes had loaded the model and the data within {LOADING / 60:.0f} minutes",
            "Each attempt that ends like this uses one retry. Read the logs of the slower pods. Put the base model on storage that "
            "all pods can read fast.",
        )


def _all_at(place: str, deadline: float, *, or_ended: bool = False) -> int:
    """Record that this rank has reached `place`, and wait for all other ranks until the deadline. Return how many ranks
    have reached it. Raises Failure(PeerLost) if `or_ended` is set and another rank ends meanwhile."""
    # One key per rank and not a counter: a rank that is replaced while the other ranks wait arrives twice.
    keys = [f"{place}/{number}" for number in range(world_size())]
    _group.store.set(keys[rank()], "1")
    while not _group.store.check(keys):
        if time.monotonic() > deadline:
            return sum(_group.store.check([key]) for key in keys)
        if or_ended and _group.store.add("ended", 0) > _group.ended:
            raise Failure(
                Reason.PEER_LOST,
                "Another process of the run ended while this process waited for it",
                "Run kubectl describe pod to see why it ended. The Job resumes from the newest checkpoint.",
            )
        time.sleep(0.1)
    return world_size()


def total(values: list[int]) -> list[int]:
    """Return each value summed over all ranks."""
    if not joined():
        return values
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(tensor, group=_group.control)
    return [int(value) for value in tensor]


def total_float(values: list[float]) -> list[float]:
    """Return each value summed over all ranks, in 64 bits."""
    if not joined():
        return values
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, group=_group.control)
    return [float(value) for value in tensor]


def from_main(value: Any) -> Any:
    """Return rank 0's value (JSON) on every rank."""
    if not joined():
        return value
    _group.told += 1
    key = f"told/{_group.told}"
    if is_main():
        _group.store.set(key, json.dumps(value))
    return json.loads(_group.store.get(key))


def to_pod(value: Any) -> None:
    """Send a value (JSON) from the pod's first process to its other processes. They receive it with from_pod()."""
    if joined():
        _group.store.set(_pod_key(), json.dumps(value))


def from_pod() -> Any:
    """Return the next value from the pod's first process. Raises Failure(PeerLost) if none comes within TOKENISING."""
    key, deadline = _pod_key(), time.monotonic() + TOKENISING
    while not _group.store.check([key]):
        if time.monotonic() > deadline:
            raise Failure(
                Reason.PEER_LOST,
                f"The pod's first process has not tokenised the dataset within {TOKENISING / 3600:.0f} hours",
                "Read the pod's log. The Job resumes from the newest checkpoint.",
            )
        time.sleep(0.2)
    return json.loads(_group.store.get(key))


def _pod_key() -> str:
    _group.told_pod += 1
    return f"pod/{rank() - local_rank()}/{_group.told_pod}"


def leave() -> None:
    """Destroy the process group. The store at rank 0 stays open for done() and until_done()."""
    from accelerate.state import AcceleratorState
    from torch import distributed

    if joined():
        _group.control = None
        distributed.destroy_process_group()
    # Code that runs after training, such as lm-eval, must not wait for the other ranks.
    AcceleratorState._reset_state(reset_partial_state=True)


def forget() -> None:
    """Remove torchrun's variables: from now on this process counts as the only one."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def done() -> None:
    """Inform the other ranks that the run is done. Wait up to HEARING until they have read it, because the store closes
    when this process ends."""
    _group.store.set("done", "1")
    deadline = time.monotonic() + HEARING
    while _group.store.add("heard", 0) < world_size() - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def until_done() -> None:
    """Wait until rank 0 calls done(). Raises torch's error if rank 0 ends before that."""
    while not _group.store.check(["done"]):
        time.sleep(0.2)
    _group.store.add("heard", 1)


def _reach(host: str, port: int, deadline: float) -> None:
    """Wait until rank 0 listens. Its host name may not resolve yet. Raises Failure(PeersMissing) after the deadline."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _alone(f"cannot connect to the first pod at {host_port(host, port)}: {error}") from error
        time.sleep(0.5)


def follows() -> bool:
    """Record that this rank ends. Return whether another rank had ended before: it recorded its end, or it was rank 0,
    which has the store."""
    _group.give_up = None  # the reason is being reported already
    if _group.store is None:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(_group.store.add("ended", 1) > 1)
        except RuntimeError as error:
            answers.append(not is_main() and connection_ended(error))

    # A host that is down does not close its connections, so the store may never answer.
    thread = threading.Thread(target=ask, name="last word", daemon=True)
    thread.start()
    thread.join(LAST_WORD)
    return bool(answers and answers[0])


def _nccl_error() -> str:
    """Return the error that torch's watchdog found in NCCL: TIMEOUT, COMM_ERROR or REMOTE_ERROR; SUCCESS if there is
    none."""
    import torch
    from torch import distributed

    world = distributed.group.WORLD
    return str(world._get_backend(torch.device("cuda")).get_error().name) if world is not None else "SUCCESS"


def _watch_nccl(state: Callable[[], str]) -> None:
    """End the process with a reason before torch's watchdog aborts it. A GPU that waits for a lost peer blocks the main
    thread. Ending is safer than TORCH_NCCL_ASYNC_ERROR_HANDLING=2, with which the GPU continues to compute with invalid
    data."""
    try:
        while (found := state()) == "SUCCESS":
            time.sleep(1)
            if not joined():
                return
    except Exception as error:
        if joined():
            log.warning("cannot watch NCCL for errors: %s", error)
        return
    log.error("NCCL reports %s", found)
    time.sleep(RAISING)
    what = "an operation timed out" if found == "TIMEOUT" else "remote process exited or there was a network error"
    if joined() and _group.give_up is not None:
        os._exit(_group.give_up(RuntimeError(f"NCCL: {what}")))


def _alone(why: str) -> Failure:
    return Failure(
        Reason.PEERS_MISSING,
        f"The other pods of the run did not start in time: {why}",
        "Each attempt that ends like this uses one retry. Run kubectl get pods to see why they do not start. If the cluster has "
        "room for only some of the pods, set spec.queue: then Kueue starts the pods of a run together or not at all.",
    )
