"""Read what Kubernetes reports about a Job: its conditions, its pods, and why it could not create one. Repair what its pods need."""

import logging
from typing import Any

from graft.bounded import OutOfBounds
from graft.contracts.job import JobFile
from graft.kube import KubeError, Manifest
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.shared import pods
from graft.reconcile.shared.access import refusal_of
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.ownership import created_by
from graft.status import seconds_left

log = logging.getLogger(__name__)


def condition_of(raw: Manifest, type_: str) -> dict[str, Any]:
    """Return a condition of a resource from the API, or an empty dict if the resource does not have it (PURE)."""
    return next((dict(item) for item in raw.get("status", {}).get("conditions", []) if item["type"] == type_), {})


def job_file_of(config_map: Manifest | None) -> JobFile | None:
    """Return the job file in a ConfigMap.

    None if the ConfigMap has no job file, or if somebody has replaced it with other text (PURE).
    """
    text = ((config_map or {}).get("data") or {}).get("job.json")
    try:
        return None if text is None else JobFile.read(text)
    except OutOfBounds:
        return None


async def refusal(ctx: Context, namespace: str, job_uid: str) -> str | None:
    """Return why a quota or an admission policy refuses the pod, or None.

    The Job controller reports it only in an Event.
    """
    try:
        events = await ctx.kube.events_of(namespace, job_uid)
    except KubeError:
        return None  # the message is only a hint, so the reconcile continues without it
    refused = [item["message"] for item in events if item.get("reason") == "FailedCreate"]
    return str(refused[-1]) if refused else None


async def pods_of(ctx: Context, namespace: str, uid: str, jobs: list[Manifest]) -> list[Manifest]:
    """Return the pods of Jobs whose owner has this UID, oldest first.

    The events of Jobs and of pods have no common order. So if a Job has ended and a pod of it seems to run, or none is
    known, the pods are read from the API server: what is written now about the end is not corrected later.
    """
    labels = {OWNER_UID: uid}
    found = created_by(jobs, await ctx.cache.list("Pod", namespace, labels))
    if any(_has_ended(job) and not _told(created_by([job], found)) for job in jobs):
        found = created_by(jobs, await ctx.cache.fresh("Pod", namespace, labels))
    return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def _has_ended(job: Manifest) -> bool:
    return any(condition_of(job, type_).get("status") == "True" for type_ in ("Complete", "Failed"))


def _told(found: list[Manifest]) -> bool:
    return bool(found) and all(map(pods.ended, found))


# What the kubelet reports only in Events about a pod whose containers it cannot start.
NOT_STARTED = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
MOUNT_SECONDS = 15  # seconds that a healthy node may take


async def not_started(ctx: Context, found: list[Manifest]) -> str | None:
    """Return why the node does not start the containers of the newest pod, or None: a volume, a Secret, a ConfigMap or
    the network is missing."""
    newest = next((pod for pod in reversed(found) if pods.creating(pod)), None)
    if newest is None or seconds_left(newest["metadata"]["creationTimestamp"], MOUNT_SECONDS) > 0:
        return None
    meta = newest["metadata"]
    try:
        events = await ctx.kube.events_of(meta["namespace"], meta["uid"])
    except KubeError:
        return None  # as above
    said = [str(item.get("message", "")) for item in events if item.get("reason") in NOT_STARTED]
    return f"pod {pods.name(newest)} does not start: {said[-1][:500]}" if said else None


async def steer(ctx: Context, child: Manifest, **wanted: Any) -> None:
    """Give a running Job these values of its spec, if somebody has changed them. All other fields are immutable, or end
    the run only earlier or later."""
    spec, metadata = child["spec"], child["metadata"]
    changed = {name: value for name, value in wanted.items() if (spec.get(name) or False) != value}
    if changed:
        patch = {"metadata": {"uid": metadata["uid"]}, "spec": changed}
        await ctx.kube.merge_patch("Job", metadata["namespace"], metadata["name"], patch)
        spec.update(changed)


async def keep(ctx: Context, namespace: str, *needed: Manifest) -> bool:
    """Create or repair the objects that the pods of a running Job need.

    Return False in a namespace that is no longer bound, or whose policies refuse them: nothing can be repaired there. The
    run continues as it is.
    """
    try:
        await ctx.kube.ensure(*needed)
    except KubeError as error:
        if refusal_of(ctx, namespace, "the children of a running Job", error) is None:
            raise
        log.info("cannot repair the children of a running Job in namespace %s: %s", namespace, error)
        return False
    return True
