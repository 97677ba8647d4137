"""The ways in which a training run ends, and the message that its user reads."""

import json

from graft.contracts.progress import Reason
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant


def never_became_an_adapter(tenant: Tenant) -> bool:
    return tenant.api.list("Adapter", tenant.name) == []


def test_an_invalid_dataset_fails_the_job_without_retries(tenant: Tenant) -> None:
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
    tenant.wait(lambda: "DatasetInvalid" in tenant.events("typo"), "an Event reports it, too")


def test_an_oom_killed_container_names_the_memory_limit(tenant: Tenant) -> None:
    tenant.job("greedy", retries=0)
    tenant.end_pod(tenant.running_pod("greedy"), 137, reason="OOMKilled")
    ended = tenant.until("FineTuneJob", "greedy", "Succeeded", "OutOfMemory")
    assert "resources.limits.memory" in ended["message"]


def test_a_termination_message_without_json_is_shown_unchanged(tenant: Tenant) -> None:
    tenant.job("crash", retries=0)
    tenant.end_pod(tenant.running_pod("crash"), 1, "Traceback: ZeroDivisionError")
    ended = tenant.until("FineTuneJob", "crash", "Succeeded", "InternalError")
    assert "ZeroDivisionError" in ended["message"] and "container train" in ended["message"]


def test_an_image_pull_error_is_shown_while_the_job_is_pending(tenant: Tenant) -> None:
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
        "the condition shows the kubelet's message", explain=lambda: json.dumps(shown),
    )  # fmt: skip
    assert tenant.status("FineTuneJob", "stuck")["stage"] == "Pending"


def test_an_unschedulable_pod_shows_the_schedulers_message(tenant: Tenant) -> None:
    tenant.job("huge", resources={"requests": {"cpu": "9999"}})
    tenant.until("FineTuneJob", "huge", "Succeeded", "Pending")
    tenant.wait(
        lambda: "Insufficient cpu" in tenant.condition("FineTuneJob", "huge", "Succeeded")["message"],
        "the condition shows the scheduler's message",
    )


def test_a_job_past_its_deadline_fails(tenant: Tenant) -> None:
    tenant.job("slow", activeDeadlineSeconds=60)
    tenant.running_pod("slow")
    tenant.wait(lambda: tenant.status("FineTuneJob", "slow").get("stage") == "Training", "the stage is Training")
    tenant.api.patch("Job", tenant.name, "slow", {"spec": {"activeDeadlineSeconds": 1}})  # the test shortens the minute
    ended = tenant.until("FineTuneJob", "slow", "Succeeded", "DeadlineExceeded")
    assert "activeDeadlineSeconds" in ended["message"]


def test_a_failed_pod_is_retried_and_the_next_pod_succeeds(tenant: Tenant) -> None:
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


def test_a_pod_that_exits_with_0_but_publishes_nothing_fails_the_job(tenant: Tenant) -> None:
    tenant.job("empty")
    tenant.end_pod(tenant.running_pod("empty"))
    ended = tenant.until("FineTuneJob", "empty", "Succeeded", "ResultMissing")
    assert "version.json" in ended["message"]
    assert never_became_an_adapter(tenant)


def test_a_file_that_changed_in_storage_is_never_served(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"])
    tenant.job("flipped")
    pod = tenant.running_pod("flipped")
    tenant.publish_as_trainer("flipped", pod)
    key = f"{tenant.name}/runs/{tenant.job_file('flipped').job.uid}/{pod}/version/adapter_model.safetensors"
    tenant.store.put(key, tenant.store.get(key)[:-1] + b"?")
    tenant.end_pod(pod)
    ended = tenant.until("FineTuneJob", "flipped", "Succeeded", "ArtifactInvalid")
    assert "adapter_model.safetensors" in ended["message"]
    assert "adapterRef" not in tenant.status("FineTuneJob", "flipped")
    assert tenant.condition("Adapter", "support-1.0.0", "Ready")["reason"] == "DigestMismatch"
    assert tenant.status("Adapter", "support-1.0.0")["stage"] == "Invalid"
    tenant.wait(
        lambda: "not Ready" in fleet.tenant.condition("AdapterDeployment", "chat", "Accepted")["message"],
        "the deployment reports why it serves nothing",
    )
    assert fleet.wanted().adapters == [] and fleet.targets() == {"support": None}


def test_an_eviction_uses_up_no_retry(tenant: Tenant) -> None:
    tenant.job("moved", retries=0)
    first = tenant.running_pod("moved")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": tenant.name}}
    tenant.api.call("POST", f"/api/v1/namespaces/{tenant.name}/pods/{first}/eviction", eviction)
    tenant.fail_pod(first, Reason.INTERRUPTED, "The pod was stopped.", "")  # as after the kubelet's SIGTERM
    second = tenant.running_pod("moved", but=(first,))
    tenant.publish_as_trainer("moved", second)
    tenant.end_pod(second)
    tenant.until("FineTuneJob", "moved", "Succeeded", "Published")
