"""What is read from pods: why one waits, why one ended."""

import json
from typing import Any

from graft.reconcile.shared.pods import ending, is_ready, waiting_message


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": status}


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    terminated = {"exitCode": code, "message": message, "reason": reason, "finishedAt": "2026-01-01T00:00:00Z"}
    return pod(phase="Failed", containerStatuses=[{"name": "train", "state": {"terminated": terminated}}])


def test_the_container_s_own_words_win() -> None:
    said = json.dumps({"reason": "DatasetInvalid", "message": "line 3: no role.", "remedy": "Add it."})
    found = ending(ended(10, said))
    assert found is not None
    assert (found.reason, found.text) == ("DatasetInvalid", "line 3: no role. Add it.")


def test_a_container_killed_for_memory_names_the_limit() -> None:
    found = ending(ended(137, reason="OOMKilled"))
    assert found is not None
    assert found.reason == "MemoryExceeded"  # the next attempt halves the micro-batch
    assert "limits.memory" in found.remedy


def test_an_exit_code_without_words_still_has_its_reason() -> None:
    found = ending(ended(12, "not json"))
    assert found is not None
    assert found.reason == "BaseModelUnavailable"


def test_an_evicted_pod_was_interrupted() -> None:
    found = ending(pod(phase="Failed", reason="Evicted", message="the node was low on memory"))
    assert found is not None
    assert found.reason == "Interrupted"


def test_an_evicted_pod_tells_what_the_node_lacked_and_not_that_it_was_killed() -> None:
    evicted = ended(137)
    message = "The node was low on resource: ephemeral-storage. Container train was using 90Gi, request is 2Gi."
    evicted["status"] |= {"reason": "Evicted", "message": message}
    found = ending(evicted)
    assert found is not None
    assert (found.reason, found.message) == ("Interrupted", message) and "nodeDiskBytes" in found.remedy


def test_a_pod_that_finds_no_node_says_why() -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes have a GPU"}
    assert "0/3 nodes have a GPU" in (waiting_message(pod(conditions=[unscheduled])) or "")


def test_an_image_that_cannot_be_pulled_says_so() -> None:
    stuck = {"name": "train", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    assert "ImagePullBackOff: no such image" in (waiting_message(pod(containerStatuses=[stuck])) or "")


def test_a_pod_on_its_way_out_is_not_ready() -> None:
    ready = pod(conditions=[{"type": "Ready", "status": "True"}])
    assert is_ready(ready)
    ready["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not is_ready(ready)
