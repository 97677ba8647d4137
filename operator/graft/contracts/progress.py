"""From training pod to operator: progress.json in object storage, the termination message and the exit codes."""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graft.bounded import Limits
from graft.contracts.message import Key, Message, Name, Real, Scalar, Whole, Words, first, first_entries

MODULES = 512  # names of target modules that a message holds
METRICS = 2000  # 32 suites and the held-out examples, measured on 4 subjects


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

    limits: ClassVar[Limits] = Limits(8192, depth=4, values=32)

    reason: Reason
    message: Words
    remedy: Words


TrainingStage = Literal["Preparing", "Training", "Evaluating", "Publishing", "Succeeded", "Failed"]


class CheckpointRef(Message):
    """A complete checkpoint in object storage."""

    step: Whole
    attempt: Name
    size_bytes: Whole
    created_at: Name


class DatasetStatistics(Message):
    """Statistics of the prepared dataset. Lengths are in tokens, before truncation unless a comment says otherwise."""

    examples: Whole = 0
    held_out: Whole = 0
    invalid: Whole = 0
    invalid_reasons: Annotated[dict[Key, Whole], first_entries(16)] = Field(default_factory=dict)  # reason -> lines
    # field of the lines that neither Graft nor the chat template reads -> lines
    unread_fields: Annotated[dict[Key, Whole], first_entries(16)] = Field(default_factory=dict)
    repeated: Whole = 0  # held-out examples that are also in the training data
    tokens: Whole = 0  # after truncation
    mean_tokens: Real = 0
    median_tokens: Whole = 0
    p95_tokens: Whole = 0
    max_tokens: Whole = 0
    truncated_share: Real = 0
    sampled: bool = False  # True: the lengths come from a sample of the examples
    # examples, with marks around the text that the loss covers
    learned: Annotated[list[Words], first(3)] = Field(default_factory=list)
    prompt_date: Name | None = None  # the date in the prompts, if the chat template writes the date of the day


class Progress(Message):
    """The state of an attempt. The pod writes it at most every 5 s, and at once when the stage changes."""

    limits: ClassVar[Limits] = Limits(256 * 1024, depth=6, values=10_000)

    attempt: Name
    stage: TrainingStage
    updated_at: Name
    step: Whole = 0
    total_steps: Whole = 0
    percent: Whole = 0
    loss: Real | None = None
    eval_loss: Real | None = None
    tokens_per_second: Real | None = None
    eta_seconds: Whole | None = None
    training: Annotated[dict[Key, Scalar], first_entries(64)] | None = None  # the resolved hyperparameters, camelCase
    target_modules: Annotated[list[Name], first(MODULES)] | None = None
    unreached: Words | None = None  # what the preset of target modules does not reach, in words
    trainable_parameters: Whole | None = None
    total_parameters: Whole | None = None
    world_size: Whole | None = None  # processes that train together
    peak_memory_bytes: Whole | None = None  # of one GPU; without GPUs, of the process
    dataset: DatasetStatistics | None = None
    resumed_from: Whole | None = None  # step of the checkpoint that this attempt resumed from
    checkpoints: Annotated[list[CheckpointRef], first(64)] | None = (
        None  # the complete checkpoints of the run, oldest first
    )
    metrics: Annotated[dict[Key, Real], first_entries(METRICS)] | None = None
    rejected: Annotated[list[Words], first(32)] | None = None  # the gates that the version missed, in words
    missing: Annotated[list[Words], first(32)] | None = None  # what could not be measured and why, in words
    manifest_digest: Name | None = None  # set when the version is published
    failure: Termination | None = None
