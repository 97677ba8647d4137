"""What a Kubernetes Job says about itself: its conditions, and why it could not create its pod."""

from typing import Any

from graft.kube import KubeError, Manifest
from graft.reconcile.shared.context import Context


def condition_of(raw: Manifest, type_: str) -> dict[str, Any]:
    """A condition of a resource as it came from the API; empty when there is none (PURE)."""
    return next((dict(item) for item in raw.get("status", {}).get("conditions", []) if item["type"] == type_), {})


async def refusal(ctx: Context, namespace: str, job_uid: str) -> str | None:
    """What the Job controller says when a quota or an admission policy refuses the pod: only an Event tells it."""
    try:
        events = await ctx.kube.events_of(namespace, job_uid)
    except KubeError:
        return None  # a hint that cannot be had is no reason to stop
    refused = [item["message"] for item in events if item.get("reason") == "FailedCreate"]
    return str(refused[-1]) if refused else None
