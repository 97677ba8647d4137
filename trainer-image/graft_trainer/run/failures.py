"""How a run fails: one place that turns any exception into a reason, a message and a remedy that a user can act on."""

import errno
from pathlib import Path
from typing import Any

from graft.artifacts.sources import SourceError
from graft.artifacts.storage import StoreError
from graft.contracts.progress import Reason, Termination

TERMINATION_LIMIT = 4096  # bytes that Kubernetes keeps of a termination message
REMEDY_LIMIT = 600  # characters


class Failure(Exception):
    """A failure whose cause is known."""

    def __init__(self, reason: Reason, message: str, remedy: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.remedy = remedy


class Interrupted(BaseException):
    """The kubelet asked the pod to end. No Exception, so that no library's handler swallows it."""


def explain(
    error: BaseException,
    hyperparameters: dict[str, Any] | None = None,
    *,
    training: bool = False,
    trained: bool = False,
    follows: bool = False,
) -> Termination:
    """Why the run failed and what to do; `hyperparameters` are the resolved ones (camelCase), when they are known, and
    `training` says that steps were still to be taken, which a smaller micro-batch makes cheaper. `trained`: a step was
    taken with the other processes; `follows`: one of them had ended before."""
    if between_processes(error) and not out_of_memory(error):
        failure = _between_processes(error, follows or (trained and connection_ended(error)))
    else:
        failure = _explain(error, hyperparameters, training)
    # Half characters (from file names or a library's text) cannot be written as UTF-8 and would hide the failure.
    clean = {name: getattr(failure, name).encode(errors="replace").decode() for name in ("message", "remedy")}
    return failure.model_copy(update=clean)


def _explain(error: BaseException, hyperparameters: dict[str, Any] | None, training: bool) -> Termination:
    if isinstance(error, Failure):
        return Termination(reason=error.reason, message=error.message, remedy=error.remedy)
    if isinstance(error, Interrupted):
        return Termination(
            reason=Reason.INTERRUPTED,
            message="The pod was asked to end before the run was complete.",
            remedy="Nothing is to be done: the Job starts another attempt unless it was deleted.",
        )
    if out_of_memory(error):
        return _out_of_memory(error, hyperparameters or {}, training)
    if isinstance(error, StoreError):
        return store_failure(error)
    if isinstance(error, SourceError):
        return base_model_failure(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Termination(
            reason=Reason.CONFIGURATION_INVALID,
            message=f"The pod's work folder is full: {error}",
            remedy="Ask for more disk: status.sizing.nodeDiskBytes is what the run needs, as ephemeral-storage in resources.requests.",
        )
    return Termination(
        reason=Reason.INTERNAL_ERROR,
        message=f"{type(error).__name__}: {error}",
        remedy="Read the container's log for the traceback and report it if it looks like a fault of Graft.",
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU. By name, so that prepare need not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    signs = ("DefaultCPUAllocator", "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def between_processes(error: BaseException) -> bool:
    """Whether a call to the other processes failed. By name, as above: gloo's errors are plain RuntimeErrors."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "NCCL" in str(error))


def connection_ended(error: BaseException) -> bool:
    """Whether the other end of a connection was closed, as the kernel does for a process that is gone."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection was likely closed",
        "Broken pipe",
        "remote process exited",
    )
    return any(sign in str(error) for sign in signs)


def _between_processes(error: BaseException, ended: bool) -> Termination:
    """PeerLost costs no retry, so somebody else must have ended, whose own reason counts."""
    said = _first_line(str(error)) or type(error).__name__
    if ended:
        return Termination(
            reason=Reason.PEER_LOST,
            message=f"Another pod of the run ended: {said}",
            remedy="See why it ended with kubectl describe pod; the Job goes on from the newest checkpoint.",
        )
    return Termination(
        reason=Reason.COMMUNICATION_FAILED,
        message=f"The processes of the run could not talk to each other: {said}",
        remedy="Each try counts as a retry. Set NCCL_DEBUG=INFO in the trainer image and read the log of every pod: "
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface, InfiniBand needs an unlimited memlock, "
        "and all nodes need the same GPU driver. After a timeout one process was much slower than the others, or stuck.",
    )


def _out_of_memory(error: BaseException, known: dict[str, Any], training: bool) -> Termination:
    message = f"Memory ran out: {_first_line(str(error)) or type(error).__name__}"
    batch = known.get("perDeviceTrainBatchSize")
    if training and isinstance(batch, int) and batch > 1:
        return Termination(
            reason=Reason.MEMORY_EXCEEDED,
            message=f"{message}, with {batch} examples per micro-batch",
            remedy="Nothing is to be done: the next attempt halves the micro-batch and doubles the accumulation.",
        )
    if isinstance(batch, int) and not training:
        message = message.replace("ran out", "ran out after the last step", 1)
        remedy = (
            "Training itself fits, and its weights are kept. Lower what the evaluation takes at once, evaluation.maxNewTokens "
            "or evaluation.fewShotExamples, in a new job, or give this one more memory and raise spec.restarts."
        )
    elif isinstance(batch, int):
        remedy = (
            f"Set training.gradientCheckpointing to true, lower training.maxLength (it was {known.get('maxLength')}), "
            "use method qlora, or give the job more memory."
        )
    else:
        remedy = "Give the job more memory, use method qlora, or use a smaller base model."
    return Termination(reason=Reason.OUT_OF_MEMORY, message=message, remedy=remedy)


def store_failure(error: StoreError, *, publishing: bool = False) -> Termination:
    """A failed call to the object store. While publishing, what the tenant's key may not write is an upload that failed."""
    message = str(error)
    match error.trouble:
        case "denied" if publishing:
            return Termination(
                reason=Reason.UPLOAD_FAILED,
                message=f"The store refused the adapter's files: {message}",
                remedy="Let the key in the Secret graft-storage write below the tenant's prefix, then raise spec.restarts: the job goes on from its newest checkpoint.",
            )
        case "denied":
            return Termination(
                reason=Reason.STORAGE_DENIED,
                message=f"The store refused the request: {message}",
                remedy="Check that the key in the Secret graft-storage is valid and may read and write below its prefix.",
            )
        case "full":
            return Termination(
                reason=Reason.UPLOAD_FAILED,
                message=f"The store is full: {message}",
                remedy="Free space in the bucket or raise its quota, then raise spec.restarts: the job goes on from its newest checkpoint.",
            )
        case "exists":
            return Termination(
                reason=Reason.VERSION_EXISTS,
                message=f"The version is published already: {message}",
                remedy="Give another output.version or leave it at auto; published versions never change.",
            )
        case "missing":
            return Termination(
                reason=Reason.STORAGE_DENIED,
                message=f"The bucket or object is not there: {message}",
                remedy="Create the bucket that the Secret graft-storage names, or correct its name there.",
            )
        case _:
            return Termination(
                reason=Reason.STORAGE_UNAVAILABLE,
                message=f"The object store did not answer: {message}",
                remedy="Check that the store's endpoint is up and reachable from the job's namespace; the Job tries again.",
            )


def base_model_failure(error: SourceError) -> Termination:
    """A base model that could not be fetched."""
    if error.transient:
        return Termination(
            reason=Reason.STORAGE_UNAVAILABLE,
            message=f"The base model's source did not answer: {error}",
            remedy="Check that the source of the BaseModel is reachable from the job's namespace; the Job tries again.",
        )
    if "no safetensors weights" in str(error):
        return Termination(
            reason=Reason.BASE_MODEL_INVALID,
            message=f"The base model cannot be used: {error}",
            remedy="Point the BaseModel at weights in safetensors; pickled weights are never loaded.",
        )
    return Termination(
        reason=Reason.BASE_MODEL_UNAVAILABLE,
        message=f"The base model cannot be had: {error}",
        remedy="Correct spec.source of the BaseModel, or let this namespace's key or Hugging Face token read it.",
    )


def termination_bytes(failure: Termination) -> bytes:
    """The termination message, cut so that it stays whole JSON within what Kubernetes keeps."""
    remedy = _cut(failure.remedy, REMEDY_LIMIT)
    length = len(failure.message)
    while True:
        cut = failure.model_copy(update={"message": _cut(failure.message, length), "remedy": remedy})
        data = cut.json_text().encode()
        if len(data) <= TERMINATION_LIMIT or length <= 1:
            return data
        length = min(length - 1, int(length * TERMINATION_LIMIT / len(data)))


def write_termination(path: Path, failure: Termination) -> None:
    """Best effort: a container without the file still has its exit code and progress.json."""
    try:
        path.write_bytes(termination_bytes(failure))
    except OSError:
        return


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 2)] + " …"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
