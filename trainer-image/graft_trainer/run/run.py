"""A run: one attempt of one job, with its settings, its store and its progress, as every stage needs them."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graft.artifacts.layout import PROGRESS, adapter_prefix, attempt_prefix, run_prefix
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.bounded import OutOfBounds
from graft.contracts.job import JobFile
from graft.contracts.message import Message
from graft.contracts.progress import DatasetStatistics, Progress, Reason

from graft_trainer.run.failures import Failure
from graft_trainer.run.interruption import Interruption
from graft_trainer.run.progress import ProgressReporter, now
from graft_trainer.run.settings import Settings
from graft_trainer.run.upload import upload_beside

M = TypeVar("M", bound=Message)


@dataclass
class Run:
    """One attempt of one job."""

    job: JobFile
    settings: Settings
    store: S3Store  # retries for settings.storage_patience
    progress: ProgressReporter
    upload: Callable[[str, Path], None]  # (key, file), during training. Raises StoreError
    halvings: int = 0  # how often the micro-batch is halved, because earlier attempts ran out of memory
    interruption: Interruption = field(default_factory=Interruption)
    cleanup: ExitStack = field(default_factory=ExitStack)  # callbacks that must finish before the process ends

    @property
    def prefix(self) -> str:
        """The folder in the store of all attempts of the job."""
        return run_prefix(self.job.tenant, self.job.job.uid)

    @property
    def version_prefix(self) -> str:
        """The folder in the store where the version is published."""
        return adapter_prefix(self.job.tenant, self.job.output.adapter, self.job.output.version)


@dataclass(frozen=True)
class Prepared:
    """What prepare returns and train starts from. It travels between their containers as a file in the work folder."""

    base_model_dir: str
    digests: dict[str, str]  # train, eval, suite/<name> -> sha256:… of the file
    dataset: dict[str, Any] = field(default_factory=dict)  # see statistics
    quantized: bool = False  # whether the weights in the base model's files are quantised

    @property
    def statistics(self) -> DatasetStatistics:
        """The number of examples and their lengths, for the progress of the stages that follow."""
        return DatasetStatistics.model_validate(self.dataset)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Prepared":
        return cls(**json.loads(path.read_text()))


def read_job(path: Path) -> JobFile:
    """Read the job file. Raises Failure if its operator is of another version than this image."""
    return read_message(path, JobFile)


def read_message(path: Path, kind: type[M]) -> M:
    """Read a file that the operator wrote. Raises Failure if its operator is of another version than this image."""
    try:
        return kind.read(path.read_bytes())
    except OutOfBounds as error:
        raise Failure(
            Reason.INTERNAL_ERROR,
            f"{path} cannot be read: {error}",
            "Use the trainer image of the operator's own version.",
        ) from error


def open_store(settings: Settings) -> S3Store:
    """Open the store of the mounted Secret. Each of its calls is retried for settings.storage_patience seconds."""
    storage = StorageConfig.from_dir(settings.storage_dir)
    try:
        return S3Store(storage, patience=settings.storage_patience, folder=settings.storage_dir)
    except ValueError as error:  # botocore raises it for an endpoint that is not a URL
        raise Failure(
            Reason.STORAGE_DENIED,
            f"the object store cannot be opened: {error}",
            "Correct the endpoint in the Secret graft-storage. It is a URL such as https://s3.example.com.",
        ) from error


def open_run(settings: Settings, store: S3Store, job: JobFile, *, write_now: bool = False, silent: bool = False) -> Run:
    """Start the attempt's progress.

    With `write_now`, progress.json is written before anything else. If the key may not write, the run then fails at
    once and not after hours of training. A `silent` run reports no progress: it is for every rank but rank 0.
    """
    prefix = attempt_prefix(job.tenant, job.job.uid, settings.attempt)
    if write_now:
        state = Progress(attempt=settings.attempt, stage="Preparing", updated_at=now())
        store.put(prefix + PROGRESS, state.json_text().encode())
    # Progress does not wait for a slow store: the next upload replaces what was not sent.
    uploads = S3Store(store.config, attempts=2, timeout=5, folder=store.access.folder)
    reporter = ProgressReporter(uploads, prefix, settings.attempt, interval=settings.progress_interval, silent=silent)
    return Run(job, settings, store, reporter, partial(upload_beside, store), halvings=job.halvings)
