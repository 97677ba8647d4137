"""How a run fails: turns every exception into a reason, a message and a remedy that a user can act on."""

import errno
from pathlib import Path
from typing import Any

from graft.artifacts.sources import SourceError, WeightsError
from graft.artifacts.storage import StoreError
from graft.contracts.progress import Reason, Termination

TERMINATION_LIMIT = 4096  # bytes that Kubernetes keeps of a termination message
REMEDY_LIMIT = 600  # characters
RESTART = (
    "Then raise spec.restarts of the FineTuneJob, which resumes from its newest checkpoint. An Adapter has no spec.restarts: "
    "delete it and create it again."
)


class Failure(Exception):
    """A failure whose cause is known."""

    def __init__(self, reason: Reason, message: str, remedy: str) -> None:
        super().__init__(reason, message, remedy)  # all of them, so that it can be sent between processes
        self.reason = reason
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message


class Interrupted(BaseException):
    """The pod received SIGTERM. Not an Exception, so that no library's exception handler catches it."""


def explain(
    error: BaseException,
    hyperparameters: dict[str, Any] | None = None,
    *,
    training: bool = False,
    trained: bool = False,
    follows: bool = False,
) -> Termination:
    """Return why the run failed and what to do.

    `hyperparameters` are the resolved values (camelCase), if they are known. `training`: the run was still training, so
    a smaller micro-batch can save memory. `trained`: this attempt has done at least one step together with the other
    ranks. `follows`: another rank had ended before.
    """
    if between_processes(error) and not out_of_memory(error):
        failure = _between_processes(error, follows or (trained and connection_ended(error)))
    else:
        failure = _explain(error, hyperparameters, training)
    # Lone surrogates, from file names or a library's text, cannot be encoded as UTF-8. The error would hide the
    # failure.
    clean = {name: getattr(failure, name).encode(errors="replace").decode() for name in ("message", "remedy")}
    return failure.model_copy(update=clean)


def _explain(error: BaseException, hyperparameters: dict[str, Any] | None, training: bool) -> Termination:
    if isinstance(error, Failure):
        return Termination(reason=error.reason, message=error.message, remedy=error.remedy)
    if isinstance(error, Interrupted):
        return Termination(
            reason=Reason.INTERRUPTED,
            message="The pod was interrupted before the run was complete.",
            remedy="No action is needed. The Job starts another attempt unless it was deleted.",
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
            remedy="Request more disk: set ephemeral-storage in spec.resources.requests to the bytes in status.sizing.nodeDiskBytes or more.",
        )
    return Termination(
        reason=Reason.INTERNAL_ERROR,
        message=f"{type(error).__name__}: {error}",
        remedy="Read the traceback in the container's log. Report it if it looks like a fault of Graft.",
    )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or a CPU.

    Errors are recognised by name, so prepare imports no torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    signs = ("DefaultCPUAllocator", "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def between_processes(error: BaseException) -> bool:
    """Return whether communication with the other ranks failed.

    Recognised by name or text: gloo raises plain RuntimeErrors.
    """
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "NCCL" in str(error))


def connection_ended(error: BaseException) -> bool:
    """Return whether the other end closed the connection.

    The kernel closes the connections of a process that has ended.
    """
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection was likely closed",
        "Broken pipe",
        "remote process exited",
    )
    return any(sign in str(error) for sign in signs)


def _between_processes(error: BaseException, ended: bool) -> Termination:
    """Return PeerLost only if another rank has ended: PeerLost uses no retry, because the other rank's reason
    counts."""
    said = _first_line(str(error)) or type(error).__name__
    if ended:
        return Termination(
            reason=Reason.PEER_LOST,
            message=f"Another pod of the run ended: {said}",
            remedy="Run kubectl describe pod to see why it ended. The Job resumes from the newest checkpoint.",
        )
    return Termination(
        reason=Reason.COMMUNICATION_FAILED,
        message=f"The ranks of the run could not communicate: {said}",
        remedy="Each attempt that ends like this uses one retry. Set NCCL_DEBUG=INFO in the trainer image and read the log of "
        "every pod. NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME select the network interface. InfiniBand needs an unlimited "
        "memlock. All nodes need the same GPU driver. If the error is a timeout, one rank was stuck or much slower than "
        "the others.",
    )


def _out_of_memory(error: BaseException, known: dict[str, Any], training: bool) -> Termination:
    message = f"Memory ran out: {_first_line(str(error)) or type(error).__name__}"
    batch = known.get("perDeviceTrainBatchSize")
    if training and isinstance(batch, int) and batch > 1:
        return Termination(
            reason=Reason.MEMORY_EXCEEDED,
            message=f"{message}, with {batch} examples per micro-batch",
            remedy="No action is needed. The next attempt halves the micro-batch and doubles the gradient accumulation.",
        )
    if isinstance(batch, int) and not training:
        message = message.replace("ran out", "ran out after the last step", 1)
        remedy = (
            "Training itself fits in memory, and its weights are kept. Give this job more memory and raise spec.restarts. "
            "Or create a new job with a lower spec.evaluation.maxNewTokens or spec.evaluation.fewShotExamples."
        )
    elif isinstance(batch, int):
        remedy = (
            f"Set spec.training.gradientCheckpointing to true, lower spec.training.maxLength (it was {known.get('maxLength')}), "
            "use method qlora, or give the job more memory."
        )
    else:
        remedy = "Give the job more memory, use method qlora, or use a smaller base model."
    return Termination(reason=Reason.OUT_OF_MEMORY, message=message, remedy=remedy)


def store_failure(error: StoreError, *, publishing: bool = False) -> Termination:
    """Return the failure for a failed call to the object store. While `publishing`, a denied write is UploadFailed."""
    message = str(error)
    match error.trouble:
        case "denied" if publishing:
            return Termination(
                reason=Reason.UPLOAD_FAILED,
                message=f"The store refused the adapter's files: {message}",
                remedy=f"Let the key in the Secret graft-storage write below the tenant's prefix. {RESTART}",
            )
        case "denied":
            return Termination(
                reason=Reason.STORAGE_DENIED,
                message=f"The store refused the request: {message}",
                remedy="Check that the key in the Secret graft-storage is valid, and that it may read and write below the tenant's prefix.",
            )
        case "full":
            return Termination(
                reason=Reason.UPLOAD_FAILED,
                message=f"The store is full: {message}",
                remedy=f"Free space in the bucket or raise its quota. {RESTART}",
            )
        case "exists":
            return Termination(
                reason=Reason.VERSION_EXISTS,
                message=f"The version is already published: {message}",
                remedy="Create the job again with another spec.output.version, or with auto. Published versions never change.",
            )
        case "missing" | "bucket":
            return Termination(
                reason=Reason.STORAGE_DENIED,
                message=f"The bucket or object does not exist: {message}",
                remedy="Create the bucket that the Secret graft-storage names, or correct the bucket's name in the Secret.",
            )
        case "large":
            return Termination(
                reason=Reason.STORAGE_DENIED,
                message=f"An object in the store is too large: {message}",
                remedy="Another writer has replaced the object. Check who may write below the tenant's prefix, and delete the object.",
            )
        case _:
            return Termination(
                reason=Reason.STORAGE_UNAVAILABLE,
                message=f"The object store did not answer: {message}",
                remedy="Check that the store's endpoint is up and reachable from the job's namespace. The Job retries.",
            )


def base_model_failure(error: SourceError) -> Termination:
    """Return the failure for a base model that could not be downloaded or read."""
    if error.transient:
        return Termination(
            reason=Reason.STORAGE_UNAVAILABLE,
            message=f"The base model's source did not answer: {error}",
            remedy="Check that the source of the BaseModel is reachable from the job's namespace. The Job retries.",
        )
    if isinstance(error, WeightsError):
        return Termination(
            reason=Reason.BASE_MODEL_INVALID,
            message=f"The base model cannot be used: {error}",
            remedy="Set spec.source of the BaseModel to weights in safetensors. Graft never loads pickled weights.",
        )
    return Termination(
        reason=Reason.BASE_MODEL_UNAVAILABLE,
        message=f"The base model cannot be read: {error}",
        remedy="Correct spec.source of the BaseModel, or let this namespace's key or Hugging Face token read it.",
    )


def termination_bytes(failure: Termination) -> bytes:
    """Return the termination message as valid JSON.

    The message and the remedy are cut to fit in TERMINATION_LIMIT bytes.
    """
    remedy = _cut(failure.remedy, REMEDY_LIMIT)
    length = len(failure.message)
    while True:
        cut = failure.model_copy(update={"message": _cut(failure.message, length), "remedy": remedy})
        data = cut.json_text().encode()
        if len(data) <= TERMINATION_LIMIT or length <= 1:
            return data
        length = min(length - 1, int(length * TERMINATION_LIMIT / len(data)))


def write_termination(path: Path, failure: Termination) -> None:
    """Write the termination message. Errors are ignored: the exit code and progress.json also report the failure."""
    try:
        path.write_bytes(termination_bytes(failure))
    except OSError:
        return


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 2)] + " …"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
