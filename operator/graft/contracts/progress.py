"""From training pod to operator: progress.json in object storage, the termination message and the exit codes."""

from enum import StrEnum
from typing import Any, Literal

from graft.contracts.message import Message


class Reason(StrEnum):
    """Why a training pod failed."""

    DATASET_INVALID = "DatasetInvalid"
    DATASET_UNAVAILABLE = "DatasetUnavailable"
    BASE_MODEL_UNAVAILABLE = "BaseModelUnavailable"
    BASE_MODEL_INVALID = "BaseModelInvalid"
    CONFIGURATION_INVALID = "ConfigurationInvalid"
    UPLOAD_FAILED = "UploadFailed"
    VERSION_EXISTS = "VersionExists"
    STORAGE_DENIED = "StorageDenied"
    OUT_OF_MEMORY = "OutOfMemory"  # a smaller micro-batch is not possible or does not help
    MEMORY_EXCEEDED = "MemoryExceeded"  # the next attempt halves the micro-batch
    PEER_LOST = "PeerLost"  # another process of the same run ended
    PEERS_MISSING = "PeersMissing"  # other pods of the run did not start in time
    COMMUNICATION_FAILED = "CommunicationFailed"  # between the ranks, while all of them were running
    ADAPTER_INVALID = "AdapterInvalid"  # an adapter to import or to compose; never on a FineTuneJob
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    INTERRUPTED = "Interrupted"
    INTERNAL_ERROR = "InternalError"


# 10-19: the user must fix the cause, and the Job fails at once (podFailurePolicy). 20-29: another attempt follows, and
# it does not count as a retry. After all other codes, the next attempt counts as a retry.
EXIT_CODES: dict[Reason, int] = {
    Reason.DATASET_INVALID: 10,
    Reason.DATASET_UNAVAILABLE: 11,
    Reason.BASE_MODEL_UNAVAILABLE: 12,
    Reason.BASE_MODEL_INVALID: 13,
    Reason.CONFIGURATION_INVALID: 14,
    Reason.UPLOAD_FAILED: 15,
    Reason.VERSION_EXISTS: 16,
    Reason.STORAGE_DENIED: 17,
    Reason.OUT_OF_MEMORY: 18,
    Reason.ADAPTER_INVALID: 19,
    Reason.MEMORY_EXCEEDED: 20,
    Reason.PEER_LOST: 21,
    Reason.STORAGE_UNAVAILABLE: 30,
    Reason.INTERRUPTED: 31,
    Reason.COMMUNICATION_FAILED: 32,
    Reason.PEERS_MISSING: 33,
    Reason.INTERNAL_ERROR: 1,
}
FATAL_EXIT_CODES = sorted(code for code in EXIT_CODES.values() if 10 <= code < 20)
FREE_EXIT_CODES = sorted(code for code in EXIT_CODES.values() if 20 <= code < 30)


class Termination(Message):
    """Why a container failed: the content of its termination message. Kubernetes keeps 4096 bytes of it."""

    reason: Reason
    message: str
    remedy: str


TrainingStage = Literal["Preparing", "Training", "Evaluating", "Publishing", "Succeeded", "Failed"]


class CheckpointRef(Message):
    """A complete checkpoint in object storage."""

    step: int
    attempt: str
    size_bytes: int
    created_at: str


class DatasetStatistics(Message):
    """Statistics of the prepared dataset. Lengths are in tokens, before truncation unless a comment says otherwise."""

    examples: int = 0
    held_out: int = 0
    invalid: int = 0
    tokens: int = 0  # after truncation
    mean_tokens: float = 0
    median_tokens: int = 0
    p95_tokens: int = 0
    max_tokens: int = 0
    truncated_share: float = 0
    sampled: bool = False  # True: the lengths come from a sample of the examples


class Progress(Message):
    """The state of an attempt. The pod writes it at most every 5 s, and at once when the stage changes."""

    attempt: str
    stage: TrainingStage
    updated_at: str
    step: int = 0
    total_steps: int = 0
    percent: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    training: dict[str, Any] | None = None  # the resolved hyperparameters, camelCase
    target_modules: list[str] | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    world_size: int | None = None  # processes that train together
    peak_memory_bytes: int | None = None  # of one GPU; without GPUs, of the process
    dataset: DatasetStatistics | None = None
    resumed_from: int | None = None  # step of the checkpoint that this attempt resumed from
    checkpoints: list[CheckpointRef] | None = None  # the complete checkpoints of the run, oldest first
    metrics: dict[str, float] | None = None
    rejected: list[str] | None = None  # the gates that the version missed, in words
    missing: list[str] | None = None  # what could not be measured and why, in words
    manifest_digest: str | None = None  # set when the version is published
    failure: Termination | None = None
