"""Read pods: why a pod does not run yet, and why it ended (PURE)."""

import re
from dataclasses import dataclass
from typing import Any

from graft.bounded import OutOfBounds
from graft.contracts.progress import EXIT_CODES, Reason, Termination
from graft.manifests.training import INDEX_LABEL

Pod = dict[str, Any]
DISK_REMEDY = "Set ephemeral-storage in resources.requests to the disk that the pod needs (FineTuneJob: status.sizing.nodeDiskBytes)."
INDEX = re.compile(r"[0-9]{1,5}")
STUCK = {
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "RunContainerError",
    "CrashLoopBackOff",
}


def sentences(message: str, remedy: str) -> str:
    """Return a message and its remedy as one text, with a stop between them."""
    message = message.strip()
    stop = "." if message and remedy and message[-1] not in ".!?…" else ""
    return f"{message}{stop} {remedy}".strip()


@dataclass(frozen=True)
class Ending:
    """Why a container or its pod ended."""

    reason: str
    message: str
    remedy: str
    at: str | None

    @property
    def text(self) -> str:
        return sentences(self.message, self.remedy)


def name(pod: Pod) -> str:
    return str(pod["metadata"]["name"])


def phase(pod: Pod) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def is_ready(pod: Pod) -> bool:
    """Return whether the pod is Ready and is not being deleted."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    return any(
        item["type"] == "Ready" and item["status"] == "True" for item in pod.get("status", {}).get("conditions", [])
    )


def statuses(pod: Pod) -> list[dict[str, Any]]:
    """Return the containers' statuses, init containers first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def running(pod: Pod, container: str) -> bool:
    return any(item["name"] == container and "running" in item.get("state", {}) for item in statuses(pod))


def started(pod: Pod) -> bool:
    """Return whether a container of the pod has started, so that the pod may have written something."""
    if phase(pod) != "Pending":
        return True
    return any("waiting" not in item.get("state", {"waiting": {}}) or item.get("lastState") for item in statuses(pod))


def ended(pod: Pod) -> bool:
    """Return whether the pod has ended, so that it writes nothing more."""
    return phase(pod) in {"Succeeded", "Failed"}


def completed(pod: Pod, container: str) -> bool:
    """Return whether a container has ended with exit code 0."""
    return any(
        item["name"] == container and item.get("state", {}).get("terminated", {}).get("exitCode") == 0
        for item in statuses(pod)
    )


def waiting_message(pod: Pod) -> str | None:
    """Return why a pod does not run yet: it is not scheduled, or a container cannot start. None if nothing is wrong."""
    for item in pod.get("status", {}).get("conditions", []):
        if item["type"] == "PodScheduled" and item["status"] == "False":
            return f"pod {name(pod)} is not scheduled: {item.get('message', item.get('reason', ''))}"
    for item in statuses(pod):
        waiting = item.get("state", {}).get("waiting", {})
        if waiting.get("reason") in STUCK:
            ending = _ending(item.get("lastState", {}).get("terminated") or {}, item["name"])
            detail = ending.text if ending else waiting.get("message", "")
            return f"container {item['name']} of pod {name(pod)}: {waiting['reason']}: {detail}".strip(": ")
        # Between two pauses of CrashLoopBackOff the container runs, and looks as if it only started.
        if item.get("restartCount", 0) and not item.get("ready"):
            ending = _ending(item.get("lastState", {}).get("terminated") or {}, item["name"])
            if ending is not None:
                return f"container {item['name']} of pod {name(pod)} was restarted {item['restartCount']} times: {ending.text}"
    return None


def creating(pod: Pod) -> bool:
    """Return whether the pod is on a node, and no container has started: the node mounts volumes and creates the network.

    A pod whose volume does not exist stays so, and its status does not say why.
    """
    found = statuses(pod)
    waiting = [item.get("state", {}).get("waiting", {}).get("reason") for item in found]
    return bool(found) and set(waiting) <= {"ContainerCreating", "PodInitializing"} and phase(pod) == "Pending"


def index(pod: Pod) -> int:
    """Return the pod's index in its run. It is 0 if the run has one pod."""
    label = str(pod["metadata"].get("labels", {}).get(INDEX_LABEL, "0"))
    return int(label) if INDEX.fullmatch(label) else 0


def disrupted(pod: Pod) -> bool:
    """Return whether the cluster ended the pod: its node was lost, or it was evicted or preempted."""
    found = pod.get("status", {}).get("conditions", [])
    return any(item["type"] == "DisruptionTarget" and item["status"] == "True" for item in found)


def ending(pod: Pod) -> Ending | None:
    """Return why a pod failed, or None if nothing failed.

    A termination message that Graft's container wrote is preferred.
    """
    status = pod.get("status", {})
    if status.get("reason") == "Evicted" and status.get("message"):
        # The node ran out of a resource, and the pod's message names it. The containers report only that they were
        # killed.
        words = str(status["message"])
        return Ending(Reason.INTERRUPTED, words, DISK_REMEDY if "ephemeral" in words else "", None)
    for item in statuses(pod):
        found = _ending(item.get("state", {}).get("terminated") or {}, item["name"])
        if found is not None:
            return found
    if phase(pod) != "Failed":
        return None
    reason = str(status.get("reason", "Failed"))
    message = status.get("message") or f"pod {name(pod)} failed: {reason}"
    return Ending(
        Reason.INTERRUPTED if disrupted(pod) or reason == "Evicted" else Reason.INTERNAL_ERROR, message, "", None
    )


def _ending(terminated: dict[str, Any], container: str) -> Ending | None:
    code = terminated.get("exitCode", 0)
    if not terminated or code == 0:
        return None
    at = terminated.get("finishedAt")
    try:
        said = Termination.read(terminated.get("message", ""))
        return Ending(said.reason, said.message, said.remedy, at)
    except OutOfBounds:
        pass  # not of Graft's own program: the kernel or a library ended the container
    if terminated.get("reason") == "OOMKilled":
        return Ending(
            Reason.MEMORY_EXCEEDED if container == "train" else Reason.OUT_OF_MEMORY,
            f"container {container} was killed: it used more memory than its limit.",
            "Raise resources.limits.memory. For a training, you can lower spec.training.perDeviceTrainBatchSize or "
            "spec.training.maxLength instead.",
            at,
        )
    known = {number: reason for reason, number in EXIT_CODES.items()}
    reason = known.get(code, Reason.INTERRUPTED if code in {137, 143} else Reason.INTERNAL_ERROR)
    tail = (terminated.get("message") or "").strip()[-400:]
    return Ending(
        reason,
        f"container {container} ended with exit code {code}. {tail}".strip(),
        f"Read the log of container {container}.",
        at,
    )
