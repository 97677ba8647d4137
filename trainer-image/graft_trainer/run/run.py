"""A run: the job, its settings and the store, as every stage needs them."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graft.api.recipe import DatasetSource
from graft.artifacts.layout import MANIFEST, PROGRESS, adapter_prefix, attempt_prefix, run_prefix
from graft.artifacts.manifest import Manifest, digest
from graft.artifacts.store import S3Store, StorageConfig, StoreError, patiently
from graft.contracts.job import JobFile
from graft.contracts.message import Message
from graft.contracts.progress import DatasetStatistics, Progress, Reason
from pydantic import ValidationError

from graft_trainer.data.dataset import Example, Reading, held_out_size, read_examples, split, vary
from graft_trainer.run.failures import Failure
from graft_trainer.run.interruption import Interruption
from graft_trainer.run.progress import ProgressReporter, now
from graft_trainer.run.settings import Settings
from graft_trainer.run.upload import upload_beside

M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One attempt of one job."""

    job: JobFile
    settings: Settings
    store: S3Store
    progress: ProgressReporter
    upload: Callable[[str, Path], None]  # a file to a key, while training goes on. StoreError
    halvings: int = 0  # how often the micro-batch is halved, because earlier attempts ran out of memory
    interruption: Interruption = field(default_factory=Interruption)
    cleanup: ExitStack = field(default_factory=ExitStack)  # what must be over before the process ends

    @property
    def version_prefix(self) -> str:
        """Where the version is published."""
        return adapter_prefix(self.job.tenant, self.job.output.adapter, self.job.output.version)


@dataclass(frozen=True)
class Prepared:
    """What prepare found, for train."""

    base_model_dir: str
    digests: dict[str, str]  # train, eval, suite/<name> -> sha256:… of the file
    dataset: dict[str, Any] = field(default_factory=dict)  # see statistics

    @property
    def statistics(self) -> DatasetStatistics:
        """What the data is like, for the progress of what follows."""
        return DatasetStatistics.model_validate(self.dataset)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Prepared":
        return cls(**json.loads(path.read_text()))


def read_job(path: Path) -> JobFile:
    """The job. Failure when the operator that wrote it is not this image's."""
    return read_message(path, JobFile)


def read_message(path: Path, kind: type[M]) -> M:
    """What the operator wrote. Failure when it is not this image's."""
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Failure(
            Reason.INTERNAL_ERROR,
            f"{path} cannot be read: {where}: {first['msg']}",
            "Use a trainer image of the operator's own version.",
        ) from error


def open_run(
    settings: Settings, storage: StorageConfig, job: JobFile, *, write_now: bool = False, silent: bool = False
) -> Run:
    """Open the store. With `write_now` progress.json is written before anything else, so that a run which may not
    write ends here and not after hours of training. A `silent` run tells nobody how far it is."""
    try:
        store = S3Store(storage)
    except ValueError as error:  # botocore's word for an endpoint that is no URL
        raise Failure(
            Reason.STORAGE_DENIED,
            f"the object store cannot be opened: {error}",
            "Correct the endpoint in the Secret graft-storage; it is a URL such as https://s3.example.com.",
        ) from error
    prefix = attempt_prefix(job.tenant, job.job.uid, settings.attempt)
    if write_now:
        state = Progress(attempt=settings.attempt, stage="Preparing", updated_at=now())
        patiently(lambda: store.put(prefix + PROGRESS, state.json_text().encode()), settings.storage_patience)
    # Progress gives up on a slow store soon: the next beat replaces what was not sent.
    uploads = S3Store(storage, attempts=2, timeout=5)
    reporter = ProgressReporter(uploads, prefix, settings.attempt, interval=settings.progress_interval, silent=silent)
    return Run(job, settings, store, reporter, partial(upload_beside, store), halvings=job.halvings)


def memory_halvings(run: Run) -> int:
    """How often the micro-batch must be halved: once more than in any attempt that ran out of memory with it. The operator
    counts them, too, also those that the kernel killed, but may be late. StoreError."""
    known = run.job.halvings
    for item in run.store.objects(run_prefix(run.job.tenant, run.job.job.uid)):
        if not item.key.endswith("/" + PROGRESS):
            continue
        progress = Progress.model_validate_json(run.store.get(item.key))
        if progress.failure is not None and progress.failure.reason == Reason.MEMORY_EXCEEDED:
            known = max(known, int((progress.training or {}).get("halvings", 0)) + 1)
    return known


def already_published(run: Run) -> tuple[Manifest, str] | None:
    """The manifest and its digest when an earlier attempt of this very job has published the version.

    Failure(VersionExists) when another job has: nothing that is trained now could be published.
    """
    try:
        data = patiently(lambda: run.store.get(run.version_prefix + MANIFEST), run.settings.storage_patience)
    except StoreError as error:
        if error.trouble == "missing":
            return None
        raise
    output = run.job.output
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        manifest = None
    if manifest is not None and manifest.job.uid == run.job.job.uid:
        return manifest, digest(data)
    by = f" by the job {manifest.job.namespace}/{manifest.job.name}" if manifest else ""
    raise Failure(
        Reason.VERSION_EXISTS,
        f"{output.adapter} {output.version} is published already{by}",
        "Give another output.version or leave it at auto; published versions never change.",
    )


@dataclass(frozen=True)
class Data:
    """What there is to learn from and to measure with."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    examples: int  # to learn from; more than in `train` when that is a sample, and so with the next
    held_out_examples: int
    invalid: int  # lines left out of both


def load_examples(run: Run) -> tuple[Sequence[Example], Sequence[Example]]:
    """(train, held out) from the files that prepare downloaded."""
    data = read_data(run)
    return data.train, data.held_out


def read_data(run: Run, most: int | None = None) -> Data:
    """The examples of the files that prepare downloaded; a sample of `most` of each file that has more."""
    dataset, seed = run.job.dataset, run.job.training.seed

    def read(role: str, source: DatasetSource) -> Reading:
        stream = (run.settings.dataset_dir / f"{role}.jsonl").open("rb")  # it stays open: the examples are read from it
        found = read_examples(stream, dataset, role=role, uri=source.uri, limit=source.limit, most=most)
        if found.invalid:
            share, shown = found.invalid / (found.invalid + found.total), "; ".join(found.problems)
            log.warning(
                "dataset.%s: %d invalid lines are left out (%.1f %%): %s", role, found.invalid, 100 * share, shown
            )
        return found

    train = read("train", dataset.train)
    learned, invalid = train.examples, train.invalid
    held: Sequence[Example] = []
    held_total = 0
    if dataset.eval is not None:
        found = read("eval", dataset.eval)
        held, held_total, invalid = found.examples, found.total, invalid + found.invalid
    elif dataset.eval_split is not None:
        learned, held = split(learned, dataset.eval_split, seed)
        held_total = held_out_size(train.total, dataset.eval_split)
    total = train.total if dataset.eval is not None else train.total - held_total
    return Data(vary(learned, dataset.templates, seed), held, total, held_total, invalid)
