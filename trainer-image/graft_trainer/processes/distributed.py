"""The processes that train together: which of them this is, how they find each other, and what they agree on.

One process per GPU, one per pod without GPUs. The variables are torchrun's, so that torch, accelerate and transformers see
what they expect. What is said here goes over gloo on the CPUs: it never waits for a GPU.
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

from graft.contracts.job import RENDEZVOUS_PORT, Pods
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure, connection_ended

log = logging.getLogger(__name__)
ARRIVAL = 900.0  # seconds: pods start at different times, one may wait for a node and pull the image
LOADING = 3600.0  # seconds: the first process reads a large model for all
SILENCE = timedelta(minutes=5)  # after which a peer that says nothing is taken for lost
TOKENISING = 3 * 3600.0  # seconds for the pod's first process to tokenise: some twenty million examples
HEARING = 10.0  # seconds for which the first process waits for the others to hear that they are done
LAST_WORD = 5.0  # seconds for a process that fails to tell the others
RAISING = 15.0  # seconds for the main thread to see by itself what NCCL reports; torch aborts the process after 60
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PartDone(BaseException):
    """This process's part of the run is done; the first one goes on alone. No Exception, for nothing has gone wrong."""


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its pod, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process reports, evaluates and publishes."""
    return rank() == 0


def variables(pods: Pods, env: Mapping[str, str], local: int = 0) -> dict[str, str]:
    """torchrun's variables for the `local`-th process of this pod; none when the run has a single process (PURE)."""
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
    """The process group, with the store at the first process through which they met."""

    def __init__(self) -> None:
        self.store: Any = None
        self.control: Any = None  # gloo, whatever the GPUs use
        self.told = 0
        self.ended = 0
        self.give_up: Callable[[BaseException], int] | None = None
        self.told_pod = 0


_group = Group()


def joined() -> bool:
    """Whether this process has peers now."""
    return _group.control is not None


def listen(give_up: Callable[[BaseException], int]) -> None:
    """`give_up` tells why the process ends and gives the exit code, where the main thread is stuck in a GPU's call."""
    _group.give_up = give_up


def join() -> None:
    """Meet the other processes. Failure(PeersMissing) when they do not come within ARRIVAL."""
    import torch
    from torch import distributed

    deadline = time.monotonic() + ARRIVAL
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    log.info("waiting for the other pods: process %d of %d, meeting at %s:%d", rank(), world_size(), host, port)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else accelerate takes all cores
    if not is_main():
        _reach(host, port, deadline)
    _group.store = distributed.TCPStore(
        "localhost" if is_main() else host, port, is_master=is_main(), wait_for_workers=False, timeout=SILENCE
    )
    # The first process decides for all, so that a round costs one retry: with it the store ends.
    here = _all_at("arrived", deadline if is_main() else float("inf"))
    if here < world_size():
        raise _alone(f"{here} of {world_size()} processes came within {ARRIVAL / 60:.0f} minutes")
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
    _group.ended = _group.store.add("ended", 0)  # some that were replaced while the others waited
    log.info("all %d processes are here", world_size())


def loaded() -> None:
    """Wait until every process has its model and its data, which takes one that reads them for all much longer than the others.
    Failure(PeerLost) when another ends meanwhile; Failure(CommunicationFailed) when they are not through within LOADING."""
    if joined() and (here := _all_at("loaded", time.monotonic() + LOADING, or_ended=True)) < world_size():
        raise Failure(
            Reason.COMMUNICATION_FAILED,
            f"{here} of {world_size()} processes had loaded model and data within {LOADING / 60:.0f} minutes",
            "Each try counts as a retry. See the log of the pods that were slower; put the base model where all read it fast.",
        )


def _all_at(place: str, deadline: float, *, or_ended: bool = False) -> int:
    """Say that this process is at `place`, and wait for all others until the deadline; how many are there."""
    # By name, for one that is replaced while the others wait comes twice.
    everybody = [f"{place}/{number}" for number in range(world_size())]
    _group.store.set(everybody[rank()], "1")
    while not _group.store.check(everybody):
        if time.monotonic() > deadline:
            return sum(_group.store.check([name]) for name in everybody)
        if or_ended and _group.store.add("ended", 0) > _group.ended:
            raise Failure(
                Reason.PEER_LOST,
                "Another process of the run ended while this one waited for it",
                "See why it ended with kubectl describe pod; the Job goes on from the newest checkpoint.",
            )
        time.sleep(0.1)
    return world_size()


def total(values: list[int]) -> list[int]:
    """Each value summed over all processes."""
    if not joined():
        return values
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(tensor, group=_group.control)
    return [int(value) for value in tensor]


def total_float(values: list[float]) -> list[float]:
    """Each value summed over all processes, in 64 bits."""
    if not joined():
        return values
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, group=_group.control)
    return [float(value) for value in tensor]


def from_main(value: Any) -> Any:
    """The first process's value, JSON, in all of them."""
    if not joined():
        return value
    _group.told += 1
    key = f"told/{_group.told}"
    if is_main():
        _group.store.set(key, json.dumps(value))
    return json.loads(_group.store.get(key))


def to_pod(value: Any) -> None:
    """A value, JSON, from the pod's first process to its others, which take it with from_pod()."""
    if joined():
        _group.store.set(_pod_key(), json.dumps(value))


def from_pod() -> Any:
    """What the pod's first process says next. Failure(PeerLost) when it does not within TOKENISING."""
    key, deadline = _pod_key(), time.monotonic() + TOKENISING
    while not _group.store.check([key]):
        if time.monotonic() > deadline:
            raise Failure(
                Reason.PEER_LOST,
                f"The pod's first process has not tokenised the dataset within {TOKENISING / 3600:.0f} hours",
                "See the log of the pod; the Job goes on from the newest checkpoint.",
            )
        time.sleep(0.2)
    return json.loads(_group.store.get(key))


def _pod_key() -> str:
    _group.told_pod += 1
    return f"pod/{rank() - local_rank()}/{_group.told_pod}"


def leave() -> None:
    """End the group; the store at the first process stays open for done() and until_done()."""
    from accelerate.state import AcceleratorState
    from torch import distributed

    if joined():
        _group.control = None
        distributed.destroy_process_group()
    # What is started after training (lm-eval among others) must not look for the others.
    AcceleratorState._reset_state(reset_partial_state=True)


def forget() -> None:
    """From now on this process is the only one."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def done() -> None:
    """Tell the others that nothing is expected of them any more, and let them hear it: the store ends with this process."""
    _group.store.set("done", "1")
    deadline = time.monotonic() + HEARING
    while _group.store.add("heard", 0) < world_size() - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def until_done() -> None:
    """Wait until the first process says so. Raises what torch does when it ends before."""
    while not _group.store.check(["done"]):
        time.sleep(0.2)
    _group.store.add("heard", 1)


def _reach(host: str, port: int, deadline: float) -> None:
    """Until the first process listens; its name may not be known yet."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _alone(f"the first pod could not be reached at {host}:{port}: {error}") from error
        time.sleep(0.5)


def follows() -> bool:
    """Says that this process ends, and whether another of the run had ended before: it said so, or it was the first one,
    which has the store."""
    _group.give_up = None  # it is being told why
    if _group.store is None:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(_group.store.add("ended", 1) > 1)
        except RuntimeError as error:
            answers.append(not is_main() and connection_ended(error))

    # A host that is gone does not close its connections, and nothing is answered.
    thread = threading.Thread(target=ask, name="last word", daemon=True)
    thread.start()
    thread.join(LAST_WORD)
    return bool(answers and answers[0])


def _nccl_error() -> str:
    """What is wrong with NCCL by torch's watchdog: TIMEOUT, COMM_ERROR, REMOTE_ERROR; SUCCESS otherwise."""
    import torch
    from torch import distributed

    world = distributed.group.WORLD
    return str(world._get_backend(torch.device("cuda")).get_error().name) if world is not None else "SUCCESS"


def _watch_nccl(state: Callable[[], str]) -> None:
    """End the process with a reason where torch's watchdog would abort it: a GPU that waits for a peer which is gone holds
    the main thread. Nothing is computed on from there, as with TORCH_NCCL_ASYNC_ERROR_HANDLING=2, which frees the GPU with
    whatever is in its memory."""
    try:
        while (found := state()) == "SUCCESS":
            time.sleep(1)
            if not joined():
                return
    except Exception as error:
        if joined():
            log.warning("NCCL is not watched: %s", error)
        return
    log.error("NCCL reports %s", found)
    time.sleep(RAISING)
    what = "an operation timed out" if found == "TIMEOUT" else "remote process exited or there was a network error"
    if joined() and _group.give_up is not None:
        os._exit(_group.give_up(RuntimeError(f"NCCL: {what}")))


def _alone(why: str) -> Failure:
    return Failure(
        Reason.PEERS_MISSING,
        f"The other pods of the run did not come: {why}",
        "Each try counts as a retry. See why they do not start with kubectl get pods. Where there is room for some of "
        "them only, set spec.queue: Kueue starts the pods of a run together or not at all.",
    )
