"""What the operator reads from pods: why a pod waits and why it ended."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from graft.reconcile.shared.context import Context
from graft.reconcile.shared.jobs import not_started
from graft.reconcile.shared.ownership import of_deployment
from graft.reconcile.shared.pods import ending, is_ready, waiting_message
from worlds.reconciling import SETTINGS, MemoryKube


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": status}


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    terminated = {"exitCode": code, "message": message, "reason": reason, "finishedAt": "2026-01-01T00:00:00Z"}
    return pod(phase="Failed", containerStatuses=[{"name": "train", "state": {"terminated": terminated}}])


def test_the_termination_message_of_the_container_is_used_first() -> None:
    said = json.dumps({"reason": "DatasetInvalid", "message": "line 3: no role.", "remedy": "Add it."})
    found = ending(ended(10, said))
    assert found is not None
    assert (found.reason, found.text) == ("DatasetInvalid", "line 3: no role. Add it.")


def test_an_oom_killed_container_names_the_memory_limit() -> None:
    found = ending(ended(137, reason="OOMKilled"))
    assert found is not None
    assert found.reason == "MemoryExceeded"  # the next attempt halves the micro-batch
    assert "limits.memory" in found.remedy


def test_an_exit_code_without_a_message_still_has_its_reason() -> None:
    found = ending(ended(12, "not json"))
    assert found is not None
    assert found.reason == "BaseModelUnavailable"


def test_an_evicted_pod_was_interrupted() -> None:
    found = ending(pod(phase="Failed", reason="Evicted", message="the node was low on memory"))
    assert found is not None
    assert found.reason == "Interrupted"


def test_the_message_of_an_evicted_pod_names_the_resource_that_the_node_lacked() -> None:
    evicted = ended(137)
    message = "The node was low on resource: ephemeral-storage. Container train was using 90Gi, request is 2Gi."
    evicted["status"] |= {"reason": "Evicted", "message": message}
    found = ending(evicted)
    assert found is not None
    assert (found.reason, found.message) == ("Interrupted", message) and "nodeDiskBytes" in found.remedy


def test_the_message_of_an_unschedulable_pod_says_why() -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes have a GPU"}
    assert "0/3 nodes have a GPU" in (waiting_message(pod(conditions=[unscheduled])) or "")


def test_an_image_that_cannot_be_pulled_is_reported() -> None:
    stuck = {"name": "train", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    assert "ImagePullBackOff: no such image" in (waiting_message(pod(containerStatuses=[stuck])) or "")


def test_a_terminating_pod_is_not_ready() -> None:
    ready = pod(conditions=[{"type": "Ready", "status": "True"}])
    assert is_ready(ready)
    ready["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not is_ready(ready)


def owned(uid: str, by: str | None = None, *, controller: bool = True) -> dict[str, Any]:
    references = [{"uid": by, "controller": controller}] if by else []
    return {"metadata": {"name": uid, "uid": uid, "ownerReferences": references}}


def test_only_pods_of_the_deployments_own_replicasets_serve() -> None:
    deployment, sets = owned("deployment", "owner"), [owned("new", "deployment"), owned("old", "deployment")]
    mine = [owned("a", "new"), owned("b", "old")]
    others = [
        owned("labels-only"),
        owned("of-another", "foreign-set"),
        owned("of-the-resource", "owner"),
        owned("of-the-deployment", "deployment"),
        owned("not-controlled", "new", controller=False),
    ]
    assert of_deployment(mine + others, [*sets, owned("foreign-set", "other")], deployment, "owner") == mine
    assert of_deployment(mine, sets, owned("deployment", "other"), "owner") == []
    assert of_deployment(mine, sets, None, "owner") == []


def test_a_container_that_runs_again_shows_its_last_words() -> None:
    """Between two pauses of CrashLoopBackOff, an engine that ends again and again looks as if it only started."""
    ended_before = {"exitCode": 1, "message": "ValueError: no such dtype", "reason": "Error"}
    again = {"name": "engine", "state": {"running": {}}, "lastState": {"terminated": ended_before}, "restartCount": 3}
    told = waiting_message(pod(phase="Running", containerStatuses=[again | {"ready": False}])) or ""
    assert "container engine of pod p was restarted 3 times" in told and "ValueError: no such dtype" in told
    assert waiting_message(pod(phase="Running", containerStatuses=[again | {"ready": True}])) is None


class Events(MemoryKube):
    """Answers with the Events of one pod."""

    def __init__(self, *found: tuple[str, str]) -> None:
        super().__init__()
        self.found, self.asked = found, 0

    async def events_of(self, namespace: str, uid: str) -> list[dict[str, Any]]:
        self.asked += 1
        return [{"reason": reason, "message": message} for reason, message in self.found]


def created(seconds_ago: int, waiting: str = "ContainerCreating") -> dict[str, Any]:
    at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    found = pod(phase="Pending", containerStatuses=[{"name": "train", "state": {"waiting": {"reason": waiting}}}])
    found["metadata"] |= {"namespace": "shop", "uid": "u", "creationTimestamp": at.strftime("%Y-%m-%dT%H:%M:%SZ")}
    return found


async def test_a_volume_that_does_not_exist_is_named() -> None:
    """The pod's status says ContainerCreating for ever. Only an Event names the ConfigMap."""
    missing = 'MountVolume.SetUp failed for volume "configmap-0": configmap "texts" not found'
    kube = Events(("Scheduled", "assigned"), ("FailedMount", missing))
    ctx = Context(kube, SETTINGS, None, None)  # type: ignore[arg-type]
    assert await not_started(ctx, [created(60)]) == f"pod p does not start: {missing}"
    assert await not_started(ctx, [created(60, "PodInitializing")]) is not None
    assert kube.asked == 2
    for healthy in (created(2), created(60, "ImagePullBackOff")):  # a node takes some seconds
        assert await not_started(ctx, [healthy]) is None
    assert await not_started(ctx, []) is None
    assert kube.asked == 2, "nothing is asked about pods that start"
