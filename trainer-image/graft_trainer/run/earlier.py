"""What earlier attempts of the job left in the store: a published version, and failures for lack of memory."""

import logging

from graft.artifacts.layout import PROGRESS
from graft.artifacts.manifest import Manifest, digest
from graft.artifacts.publishing import staged
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.bounded import OutOfBounds
from graft.contracts.progress import Progress, Reason

from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Run

log = logging.getLogger(__name__)


def find_manifest(store: S3Store, prefix: str, uid: str) -> tuple[Manifest | None, str] | None:
    """Return the manifest of a version and its digest, if it is published below `prefix`, or staged by the job `uid`.

    (None, "") if it is unreadable, None if there is none. Raises StoreError.
    """
    try:
        return read_manifest(store, prefix, None)
    except InvalidArtifact:
        return None, ""
    except StoreError as error:
        if error.trouble != "missing":
            raise
    try:
        found = staged(store, prefix.partition("/")[0], uid)
    except InvalidArtifact:
        return None, ""
    return None if found is None else (found[0], digest(found[1]))


def already_published(run: Run) -> tuple[Manifest, str] | None:
    """Return the manifest and its digest if an attempt of this job has published the version.

    Raises Failure(VersionExists) if another job has published it, because this run could not publish its result.
    """
    if (found := find_manifest(run.store, run.version_prefix, run.job.job.uid)) is None:
        return None
    manifest, found_digest = found
    if manifest is not None and manifest.job.uid == run.job.job.uid:
        return manifest, found_digest
    output = run.job.output
    by = f" by the job {manifest.job.namespace}/{manifest.job.name}" if manifest else ""
    raise Failure(
        Reason.VERSION_EXISTS,
        f"{output.adapter} {output.version} is already published{by}",
        "Create the job again with another spec.output.version, or with auto. Published versions never change.",
    )


def memory_halvings(run: Run) -> int:
    """Return how often the micro-batch must be halved: once more than in any attempt that ran out of memory.

    The operator also counts, and it includes the attempts that the kernel killed. Its count in the job file can be
    late. Raises StoreError.
    """
    known = run.job.halvings
    for item in run.store.objects(run.prefix):
        if not item.key.endswith("/" + PROGRESS):
            continue
        progress = _progress(run.store, item.key)
        if progress is None or progress.failure is None or progress.failure.reason != Reason.MEMORY_EXCEEDED:
            continue
        halvings = (progress.training or {}).get("halvings", 0)
        known = max(known, 1 + (halvings if isinstance(halvings, int) else 0))
    return known


def _progress(store: S3Store, key: str) -> Progress | None:
    """Return the progress of an attempt, or None if it is not readable or is deleted meanwhile. Raises StoreError."""
    try:
        return Progress.read(store.get(key, most=Progress.limits.size))
    except OutOfBounds as error:
        log.warning("%s is not readable, so its failure is not counted: %s", key, error)
    except StoreError as error:
        if error.trouble not in {"missing", "large"}:
            raise
    return None
