"""Read what the pods of a FineTuneJob report in storage: progress.json.

An event of another object of the job must not read it again. It is read when the pod has changed, and when a poll is due.
"""

import time
from typing import NamedTuple

from graft.api import FineTuneJob
from graft.artifacts import layout
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.bounded import OutOfBounds
from graft.contracts.progress import Progress
from graft.kube import Manifest
from graft.reconcile.shared import pods
from graft.reconcile.shared.context import SOON, Context

FRESH = SOON / 2  # seconds; less than between two polls
MOST = 500  # jobs whose last report is remembered; a pod decides how large it is


class Report(NamedTuple):
    """The last report of a job. `pod`: the state of the pod before it was read."""

    pod: tuple[str, str]
    at: float  # seconds, time.monotonic
    progress: Progress | None


async def read(ctx: Context, job: FineTuneJob, pod: Manifest, *, must: bool) -> Progress | None:
    """Return the progress.json of a pod, or None if there is none, or if it cannot be read now.

    With `must`, raises StoreError if the store does not answer: the caller copies the facts in it only once.
    """
    if not pods.started(pod):
        return None
    uid, state = job.metadata.uid, (pods.name(pod), str(pod["metadata"].get("resourceVersion")))
    last: Report | None = ctx.reports.get(uid)
    if last is not None and last.pod == state and (pods.ended(pod) or time.monotonic() - last.at < FRESH):
        return last.progress
    prefix = layout.attempt_prefix(layout.tenant_of(job.metadata.namespace), uid, pods.name(pod))
    try:
        found = await ctx.stored(job.metadata.namespace, _fetch, prefix + layout.PROGRESS)
    except OutOfBounds:
        found = None  # the pod's status is enough
    except StoreError as error:
        if error.trouble not in {"missing", "large"}:
            if must:
                raise
            return None
        found = None  # not written yet
    ctx.reports.pop(uid, None)
    ctx.reports[uid] = Report(state, time.monotonic(), found)
    if len(ctx.reports) > MOST:
        del ctx.reports[next(iter(ctx.reports))]
    return found


def forget(ctx: Context, job: FineTuneJob) -> None:
    """Forget the last report of a job that has ended."""
    ctx.reports.pop(job.metadata.uid, None)


def _fetch(store: S3Store, key: str) -> Progress:
    return Progress.read(store.get(key, most=Progress.limits.size))
