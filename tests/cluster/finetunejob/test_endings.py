"""How a training can end, and what its user reads then."""

import json

from graft.contracts.progress import Reason
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant


def never_became_an_adapter(tenant: Tenant) -> bool:
    return tenant.api.list("Adapter", tenant.name) == []


def test_a_bad_dataset_ends_the_job_at_once(tenant: Tenant) -> None:
    tenant.job("typo", retries=5)
    pod = tenant.running_pod("typo")
    tenant.fail_pod(pod, Reason.DATASET_INVALID, "line 7 of train.jsonl has no messages.", "Add them, then apply anew.")
    ended = tenant.until("FineTuneJob", "typo", "Succeeded", "DatasetInvalid", timeout=15)
    assert ended["status"] == "False"
    assert ended["message"] == "line 7 of train.jsonl has no messages. Add them, then apply anew."
    status = tenant.status("FineTuneJob", "typo")
    assert status["stage"] == "Failed" and status["completionTime"]
    assert [(item["pod"], item["reason"]) for item in status["attempts"]] == [(pod, "DatasetInvalid")]
    assert never_became_an_adapter(tenant)
    tenant.wait(lambda: "DatasetInvalid" in tenant.events("typo"), "an Event tells it, too")


def test_a_container_that_used_too_much_memory(tenant: Tenant) -> None:
    tenant.job("greedy", retries=0)
    tenant.end_pod(tenant.running_pod("greedy"), 137, reason="OOMKilled")
    ended = tenant.until("FineTuneJob", "greedy", "Succeeded", "OutOfMemory")
    assert "resources.limits.memory" in ended["message"]


def test_words_without_json_are_shown_as_they_are(tenant: Tenant) -> None:
    tenant.job("crash", retries=0)
    tenant.end_pod(tenant.running_pod("crash"), 1, "Traceback: ZeroDivisionError")
    ended = tenant.until("FineTuneJob", "crash", "Succeeded", "InternalError")
    assert "ZeroDivisionError" in ended["message"] and "container train" in ended["message"]


def test_an_image_that_cannot_be_pulled_is_told_while_the_job_waits(tenant: Tenant) -> None:
    tenant.job("stuck")
    pod = tenant.running_pod("stuck")
    waiting = {"reason": "ImagePullBackOff", "message": "no such image graft/trainer:test"}
    state = {
        "name": "train",
        "ready": False,
        "restartCount": 0,
        "image": "x",
        "imageID": "",
        "state": {"waiting": waiting},
    }
    state["state"]["running"] = None  # type: ignore[index]
    tenant.api.patch_status("Pod", tenant.name, pod, {"phase": "Pending", "containerStatuses": [state]})
    shown = tenant.until("FineTuneJob", "stuck", "Succeeded", "Pending")
    tenant.wait(
        lambda: "no such image" in tenant.condition("FineTuneJob", "stuck", "Succeeded")["message"],
        "the kubelet's words show", explain=lambda: json.dumps(shown),
    )  # fmt: skip
    assert tenant.status("FineTuneJob", "stuck")["stage"] == "Pending"


def test_a_pod_that_finds_no_node_says_so(tenant: Tenant) -> None:
    tenant.job("huge", resources={"requests": {"cpu": "9999"}})
    tenant.until("FineTuneJob", "huge", "Succeeded", "Pending")
    tenant.wait(
        lambda: "Insufficient cpu" in tenant.condition("FineTuneJob", "huge", "Succeeded")["message"],
        "the scheduler's words show",
    )


def test_a_deadline(tenant: Tenant) -> None:
    tenant.job("slow", activeDeadlineSeconds=60)
    tenant.running_pod("slow")
    tenant.wait(lambda: tenant.status("FineTuneJob", "slow").get("stage") == "Training", "it trains")
    tenant.api.patch("Job", tenant.name, "slow", {"spec": {"activeDeadlineSeconds": 1}})  # a minute, shortened
    ended = tenant.until("FineTuneJob", "slow", "Succeeded", "DeadlineExceeded")
    assert "activeDeadlineSeconds" in ended["message"]


def test_a_crash_is_tried_again_and_the_next_pod_succeeds(tenant: Tenant) -> None:
    tenant.job("lucky", retries=2)
    first = tenant.running_pod("lucky")
    tenant.fail_pod(first, Reason.STORAGE_UNAVAILABLE, "The store did not answer.", "")
    retrying = tenant.until("FineTuneJob", "lucky", "Succeeded", "Retrying")
    assert retrying["status"] == "Unknown" and "The store did not answer." in retrying["message"]
    second = tenant.running_pod("lucky", but=(first,))
    tenant.publish_as_trainer("lucky", second)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "lucky", "Succeeded", "Published")
    attempts = tenant.status("FineTuneJob", "lucky")["attempts"]
    assert [(item["pod"], item["reason"]) for item in attempts] == [
        (first, "StorageUnavailable"),
        (second, "Completed"),
    ]


def test_a_pod_that_succeeds_and_leaves_nothing(tenant: Tenant) -> None:
    tenant.job("empty")
    tenant.end_pod(tenant.running_pod("empty"))
    ended = tenant.until("FineTuneJob", "empty", "Succeeded", "ResultMissing")
    assert "manifest.json" in ended["message"]
    assert never_became_an_adapter(tenant)


def test_a_file_that_changed_in_storage_is_never_served(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"])
    tenant.job("flipped")
    pod = tenant.running_pod("flipped")
    prefix = tenant.publish_as_trainer("flipped", pod)
    key = prefix + "adapter_model.safetensors"
    tenant.store.put(key, tenant.store.get(key)[:-1] + b"?")
    tenant.end_pod(pod)
    ended = tenant.until("FineTuneJob", "flipped", "Succeeded", "ArtifactInvalid")
    assert "adapter_model.safetensors" in ended["message"]
    assert "adapterRef" not in tenant.status("FineTuneJob", "flipped")
    assert tenant.condition("Adapter", "support-1.0.0", "Ready")["reason"] == "DigestMismatch"
    assert tenant.status("Adapter", "support-1.0.0")["stage"] == "Invalid"
    tenant.wait(
        lambda: "not Ready" in fleet.tenant.condition("AdapterDeployment", "chat", "Accepted")["message"],
        "the deployment says why it serves nothing",
    )
    assert fleet.wanted().adapters == [] and fleet.targets() == {"support": None}


def test_an_eviction_does_not_cost_a_retry(tenant: Tenant) -> None:
    tenant.job("moved", retries=0)
    first = tenant.running_pod("moved")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": tenant.name}}
    tenant.api.call("POST", f"/api/v1/namespaces/{tenant.name}/pods/{first}/eviction", eviction)
    tenant.fail_pod(first, Reason.INTERRUPTED, "The pod was stopped.", "")  # SIGTERM, as the kubelet sends it
    second = tenant.running_pod("moved", but=(first,))
    tenant.publish_as_trainer("moved", second)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "moved", "Succeeded", "Published")
