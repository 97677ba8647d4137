"""A run: the job, its settings and the store, as every stage needs them."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from graft.artifacts.layout import MANIFEST, PROGRESS, adapter_prefix, attempt_prefix
from graft.artifacts.manifest import Manifest, digest
from graft.artifacts.store import S3Store, StorageConfig, StoreError
from graft.contracts import JobFile, Progress, Reason
from pydantic import ValidationError

from graft_trainer.dataset import Example, read_examples, split
from graft_trainer.download import patiently
from graft_trainer.failures import Failure
from graft_trainer.progress import ProgressReporter, now
from graft_trainer.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One attempt of one job."""

    job: JobFile
    settings: Settings
    store: S3Store
    progress: ProgressReporter
    halvings: int = 0  # how often the micro-batch is halved, because earlier attempts ran out of memory

    @property
    def version_prefix(self) -> str:
        """Where the version is published."""
        return adapter_prefix(self.job.tenant, self.job.output.adapter, self.job.output.version)


@dataclass(frozen=True)
class Prepared:
    """What prepare found, for train."""

    base_model_dir: str
    digests: dict[str, str]  # train, eval -> sha256:… of the file

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Prepared":
        return cls(**json.loads(path.read_text()))


def read_job(path: Path) -> JobFile:
    """The job. Failure when the operator that wrote it is not this image's."""
    try:
        return JobFile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Failure(
            Reason.INTERNAL_ERROR,
            f"{path} cannot be read: {where}: {first['msg']}",
            "Use a trainer image of the operator's own version.",
        ) from error


def open_run(settings: Settings, storage: StorageConfig, job: JobFile, *, write_now: bool = False) -> Run:
    """Open the store. With `write_now` progress.json is written before anything else, so that a run which may not
    write ends here and not after hours of training."""
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
    reporter = ProgressReporter(uploads, prefix, settings.attempt, interval=settings.progress_interval)
    return Run(job, settings, store, reporter, halvings=job.halvings)


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


def load_examples(run: Run) -> tuple[list[Example], list[Example]]:
    """(train, held out) from the files that prepare downloaded."""
    dataset, folder = run.job.dataset, run.settings.dataset_dir
    with (folder / "train.jsonl").open("rb") as stream:
        train = read_examples(stream, dataset, role="train", uri=dataset.train.uri, limit=dataset.train.limit)
    if dataset.eval is not None:
        with (folder / "eval.jsonl").open("rb") as stream:
            return train, read_examples(stream, dataset, role="eval", uri=dataset.eval.uri, limit=dataset.eval.limit)
    if dataset.eval_split is not None:
        return split(train, dataset.eval_split, run.job.training.seed)
    return train, []
