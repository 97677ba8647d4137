"""The life of a long run: queued, suspended, resumed, out of memory, spread over pods, judged by gates, cleaned up."""

import json
from typing import Any

from graft.contracts.progress import CheckpointRef, DatasetStatistics, Reason
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant


def job_of(tenant: Tenant, name: str) -> Object:
    return tenant.get("Job", name)


def finish(tenant: Tenant, job: str, pod: str) -> None:
    tenant.publish_as_trainer(job, pod)
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", job, "Succeeded", "Published")


def test_a_queued_job_waits_for_kueue(tenant: Tenant) -> None:
    tenant.job("queued", queue="team-queue")
    waiting = tenant.until("FineTuneJob", "queued", "Succeeded", "Queued")
    assert waiting["status"] == "Unknown" and "team-queue" in waiting["message"]
    assert tenant.status("FineTuneJob", "queued")["stage"] == "Queued"
    held = job_of(tenant, "queued")
    assert held["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert held["spec"]["suspend"] is True and tenant.pods(tenant.get("FineTuneJob", "queued")) == []
    # Kueue admits the Job: it sets spec.suspend to false and changes nothing else.
    tenant.api.patch("Job", tenant.name, "queued", {"spec": {"suspend": False}})
    finish(tenant, "queued", tenant.running_pod("queued"))


def test_a_suspended_job_resumes_from_its_checkpoint(tenant: Tenant) -> None:
    tenant.job("paused")
    first = tenant.running_pod("paused")
    kept = [CheckpointRef(step=40, attempt=first, size_bytes=1000, created_at="2026-01-01T00:00:00Z")]
    tenant.progress("paused", first, stage="Training", step=47, total_steps=100, percent=47, checkpoints=kept)
    tenant.wait(lambda: tenant.status("FineTuneJob", "paused").get("checkpoints"), "the checkpoint is in the status")
    assert tenant.status("FineTuneJob", "paused")["checkpoints"][0]["step"] == 40

    tenant.api.patch("FineTuneJob", tenant.name, "paused", {"spec": {"suspend": True}})
    shown = tenant.until("FineTuneJob", "paused", "Succeeded", "Suspended")
    assert "checkpoint of step 40" in shown["message"]
    owner = tenant.get("FineTuneJob", "paused")
    tenant.wait(lambda: tenant.pods(owner) == [], "the pods are deleted")
    assert tenant.status("FineTuneJob", "paused")["stage"] == "Suspended"

    tenant.api.patch("FineTuneJob", tenant.name, "paused", {"spec": {"suspend": False}})
    second = tenant.running_pod("paused", but=(first,))
    tenant.progress("paused", second, stage="Training", step=41, total_steps=100, percent=41, resumed_from=40)
    finish(tenant, "paused", second)
    attempts = tenant.status("FineTuneJob", "paused")["attempts"]
    assert [(item["pod"], item["reason"]) for item in attempts] == [(first, "Interrupted"), (second, "Completed")]
    assert attempts[1]["resumedFrom"] == 40


def test_a_job_that_is_created_suspended_creates_no_objects(tenant: Tenant) -> None:
    tenant.job("later", suspend=True)
    tenant.until("FineTuneJob", "later", "Succeeded", "Suspended")
    shown = tenant.get("FineTuneJob", "later")
    assert shown["metadata"]["labels"]["graft.dev/method"] == "lora" and shown["status"]["sizing"]
    assert tenant.api.get("Job", tenant.name, "later") is None
    assert tenant.api.get("ConfigMap", tenant.name, "later-job") is None
    tenant.api.patch("FineTuneJob", tenant.name, "later", {"spec": {"suspend": False}})
    finish(tenant, "later", tenant.running_pod("later"))


def test_running_out_of_memory_halves_the_micro_batch(tenant: Tenant) -> None:
    tenant.job("big", retries=1)
    first = tenant.running_pod("big")
    known: dict[str, Any] = {"perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 2}
    tenant.progress("big", first, stage="Training", step=1, total_steps=9, training=known)
    tenant.wait(
        lambda: _attempt(tenant, "big", 0).get("microBatch") == 8, "the status has the micro-batch of the first attempt"
    )
    assert tenant.job_file("big").halvings == 0
    # The trainer reports this reason itself. It uses up no retry.
    tenant.fail_pod(first, Reason.MEMORY_EXCEEDED, "Memory ran out with 8 examples at once.", "Half as many follow.")
    second = tenant.running_pod("big", but=(first,))
    tenant.wait(lambda: tenant.job_file("big").halvings == 1, "the job file tells the next attempt to halve once")
    known = {"perDeviceTrainBatchSize": 4, "gradientAccumulationSteps": 4}
    tenant.progress("big", second, stage="Training", step=1, total_steps=9, training=known)
    tenant.wait(
        lambda: _attempt(tenant, "big", 1).get("microBatch") == 4,
        "the status has the micro-batch of the second attempt",
    )
    # The kernel killed the container, so that the trainer could not report a reason.
    tenant.end_pod(second, 137, reason="OOMKilled")
    third = tenant.running_pod("big", but=(first, second))
    tenant.wait(lambda: tenant.job_file("big").halvings == 2, "the job file tells the next attempt to halve twice")
    finish(tenant, "big", third)
    attempts = tenant.status("FineTuneJob", "big")["attempts"]
    assert [item["reason"] for item in attempts] == ["MemoryExceeded", "MemoryExceeded", "Completed"]
    assert [(item.get("microBatch"), item.get("accumulation")) for item in attempts[:2]] == [(8, 2), (4, 4)]


def test_memory_too_small_for_one_example_fails_without_retries(tenant: Tenant) -> None:
    tenant.job("bigger", retries=5)
    remedy = "Set training.gradientCheckpointing to true."
    tenant.fail_pod(tenant.running_pod("bigger"), Reason.OUT_OF_MEMORY, "Memory ran out with one example.", remedy)
    ended = tenant.until("FineTuneJob", "bigger", "Succeeded", "OutOfMemory", timeout=20)
    assert ended["status"] == "False" and remedy in ended["message"]
    assert len(tenant.status("FineTuneJob", "bigger")["attempts"]) == 1


def _attempt(tenant: Tenant, job: str, number: int) -> Object:
    attempts = tenant.status("FineTuneJob", job).get("attempts") or []
    return dict(attempts[number]) if len(attempts) > number else {}


def test_several_pods_train_together(tenant: Tenant) -> None:
    resources = {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "128Mi"}}
    tenant.job("wide", nodes=2, resources=resources)
    owner = tenant.get("FineTuneJob", "wide")
    running = lambda: [pod for pod in tenant.pods(owner) if pod["status"].get("phase") == "Running"]  # noqa: E731
    tenant.wait(lambda: len(running()) == 2, "both pods run")
    made = job_of(tenant, "wide")["spec"]
    assert (made["completionMode"], made["completions"], made["parallelism"]) == ("Indexed", 2, 2)
    service = tenant.get("Service", "wide-peers")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    file = tenant.job_file("wide")
    assert (file.pods.nodes, file.pods.processes_per_node) == (2, 1)
    assert file.pods.first_host == f"wide-0.wide-peers.{tenant.name}.svc"
    pods = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: pod for pod in running()}
    assert pods["0"]["spec"]["hostname"] == "wide-0" and pods["0"]["spec"]["subdomain"] == "wide-peers"
    names = {index: pod["metadata"]["name"] for index, pod in pods.items()}

    tenant.progress("wide", names["0"], stage="Training", step=5, total_steps=10, percent=50, world_size=2)
    tenant.wait(
        lambda: tenant.status("FineTuneJob", "wide").get("progressText") == "50%",
        "the status has the progress of rank 0",
    )
    assert tenant.status("FineTuneJob", "wide")["resolved"]["worldSize"] == 2

    # Pod 1 fails. Pod 0 ends because it lost its peer. The attempts keep the two reasons apart.
    tenant.fail_pod(names["1"], Reason.STORAGE_UNAVAILABLE, "The store did not answer.", "")
    tenant.fail_pod(names["0"], Reason.PEER_LOST, "Another pod of the run ended.", "")
    again = lambda: [pod for pod in running() if pod["metadata"]["name"] not in names.values()]  # noqa: E731
    tenant.wait(
        lambda: len(again()) == 2,
        "both pods are replaced",
        explain=lambda: json.dumps(tenant.status("FineTuneJob", "wide")),
    )
    by_index = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: pod for pod in again()}
    tenant.end_pod(by_index["1"]["metadata"]["name"])
    finish(tenant, "wide", by_index["0"]["metadata"]["name"])
    attempts = tenant.status("FineTuneJob", "wide")["attempts"]
    ended = sorted((item["index"], item["reason"]) for item in attempts)
    assert ended == [(0, "Completed"), (0, "PeerLost"), (1, "Completed"), (1, "StorageUnavailable")]


def test_missing_peers_use_up_the_retries(tenant: Tenant) -> None:
    resources = {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "128Mi"}}
    tenant.job("apart", nodes=2, resources=resources, retries=0)
    remedy = "Set spec.queue."
    tenant.fail_pod(tenant.running_pod("apart"), Reason.PEERS_MISSING, "1 of 2 processes came.", remedy)
    ended = tenant.until("FineTuneJob", "apart", "Succeeded", "PeersMissing")
    assert ended["status"] == "False" and remedy in ended["message"]


def test_scores_that_were_not_measured_are_listed(tenant: Tenant) -> None:
    tenant.job("unmeasured")
    pod = tenant.running_pod("unmeasured")
    missing = ["base model, quiz: Memory ran out"]
    tenant.progress("unmeasured", pod, stage="Succeeded", missing=missing)
    finish(tenant, "unmeasured", pod)
    shown = tenant.condition("FineTuneJob", "unmeasured", "Succeeded")["message"]
    assert shown.endswith("; not measured: base model, quiz: Memory ran out")


def test_a_version_that_misses_a_gate_is_rejected_and_never_served(tenant: Tenant) -> None:
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"])
    tenant.job("judged", evaluation={"gates": [{"metric": "exactMatch", "min": 0.95}]})
    pod = tenant.running_pod("judged")
    missed = "exactMatch is 0.91, the gate requires at least 0.95"
    tenant.publish_as_trainer("judged", pod, rejected=[missed])
    tenant.end_pod(pod)
    ended = tenant.until("FineTuneJob", "judged", "Succeeded", "GateFailed")
    assert ended["status"] == "False" and missed in ended["message"]
    status = tenant.status("FineTuneJob", "judged")
    assert status["stage"] == "Rejected" and status["adapterRef"]["name"] == "support-1.0.0"
    assert tenant.condition("Adapter", "support-1.0.0", "Ready")["reason"] == "Rejected"
    assert tenant.status("Adapter", "support-1.0.0")["stage"] == "Rejected"
    assert tenant.status("Adapter", "support-1.0.0")["metrics"]["exactMatch"] == 0.91
    tenant.wait(
        lambda: "not Ready" in tenant.condition("AdapterDeployment", "chat", "Accepted").get("message", ""),
        "the deployment reports why it serves nothing",
    )
    assert fleet.wanted().adapters == []


def test_the_trainer_gets_the_current_version_for_a_gate_over_it(tenant: Tenant) -> None:
    tenant.trained("before")
    gate = {"metric": "exactMatch", "minGain": 0, "over": "current"}
    tenant.job("after", evaluation={"gates": [gate]})
    tenant.running_pod("after")
    current = tenant.job_file("after").current
    adapter = tenant.get("Adapter", "support-1.0.0")["spec"]["artifact"]
    assert current is not None and current.version == "1.0.0"
    assert (current.uri, current.digest) == (adapter["uri"], adapter["digest"])


def test_the_status_has_the_dataset_statistics(tenant: Tenant) -> None:
    tenant.job("looked")
    pod = tenant.running_pod("looked")
    found = DatasetStatistics(examples=90, held_out=10, invalid=2, max_tokens=300, truncated_share=0.125)
    tenant.progress("looked", pod, stage="Preparing", dataset=found)
    tenant.wait(lambda: tenant.status("FineTuneJob", "looked").get("dataset"), "the statistics are in the status")
    shown = tenant.status("FineTuneJob", "looked")["dataset"]
    assert (shown["examples"], shown["invalid"], shown["truncatedShare"]) == (90, 2, 0.125)


def test_raising_restarts_resumes_a_failed_job_from_its_checkpoint(tenant: Tenant) -> None:
    tenant.job("stubborn", retries=0, restarts=3)
    first = tenant.running_pod("stubborn")
    kept = [CheckpointRef(step=40, attempt=first, size_bytes=1000, created_at="2026-01-01T00:00:00Z")]
    tenant.progress("stubborn", first, stage="Training", step=47, total_steps=100, percent=47, checkpoints=kept)
    tenant.wait(lambda: tenant.status("FineTuneJob", "stubborn").get("checkpoints"), "the checkpoint is in the status")
    checkpoint = (
        f"{tenant.name}/runs/{tenant.job_file('stubborn').job.uid}/{first}/checkpoints/step-000040/rank-0000.json"
    )
    tenant.store.put(checkpoint, b"{}")
    tenant.fail_pod(first, Reason.OUT_OF_MEMORY, "No memory.", "Give it more.")
    tenant.until("FineTuneJob", "stubborn", "Succeeded", "OutOfMemory")
    assert tenant.status("FineTuneJob", "stubborn")["restarts"] == 3  # the value at creation starts nothing

    more = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    change = {"restarts": 4, "retries": 1, "resources": more}
    tenant.api.patch("FineTuneJob", tenant.name, "stubborn", {"spec": change})
    second = tenant.running_pod("stubborn", but=(first,))
    tenant.wait(
        lambda: any(
            "from the checkpoint of step 40" in item["message"] for item in tenant.api.list("CoreEvent", tenant.name)
        ),
        "an Event names the checkpoint",
    )
    pod: Any = tenant.get("Pod", second)
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"memory": "2Gi"}
    assert tenant.get("Job", "stubborn")["spec"]["backoffLimit"] == 1
    left = [item.key for item in tenant.store.objects(f"{tenant.name}/runs/{tenant.job_file('stubborn').job.uid}/")]
    assert left == [checkpoint]  # the progress of the first attempt is deleted
    tenant.progress("stubborn", second, stage="Training", step=41, total_steps=100, percent=41, resumed_from=40)
    finish(tenant, "stubborn", second)
    status = tenant.status("FineTuneJob", "stubborn")
    assert [(item["pod"], item["resumedFrom"]) for item in status["attempts"]] == [(second, 40)]
    assert (status["restarts"], status["adapterRef"]["version"]) == (4, "1.0.0")

    tenant.api.patch("FineTuneJob", tenant.name, "stubborn", {"spec": {"restarts": 5}})
    tenant.job("next")  # when this job ends, the operator has reconciled the edit above, too
    finish(tenant, "next", tenant.running_pod("next"))
    assert tenant.status("FineTuneJob", "stubborn")["restarts"] == 4  # a job that succeeded is not started again


def test_a_job_that_failed_after_publishing_keeps_its_version(tenant: Tenant) -> None:
    tenant.job("late", retries=0)
    first = tenant.running_pod("late")
    tenant.publish_as_trainer("late", first)
    tenant.fail_pod(first, Reason.INTERNAL_ERROR, "It was killed on its way out.", "")
    tenant.until("FineTuneJob", "late", "Succeeded", "InternalError")
    tenant.api.patch("FineTuneJob", tenant.name, "late", {"spec": {"restarts": 1}})
    second = tenant.running_pod("late", but=(first,))
    assert tenant.job_file("late").output.version == "1.0.0"
    tenant.end_pod(second)  # the trainer finds the published version and exits with 0
    tenant.until("FineTuneJob", "late", "Succeeded", "Published")
    assert tenant.status("FineTuneJob", "late")["adapterRef"]["version"] == "1.0.0"


def test_a_finished_job_is_deleted_after_its_ttl_and_the_adapter_stays(tenant: Tenant) -> None:
    tenant.trained("brief")
    assert tenant.api.get("FineTuneJob", tenant.name, "brief") is not None
    tenant.api.patch("FineTuneJob", tenant.name, "brief", {"spec": {"ttlSecondsAfterFinished": 1}})
    tenant.gone("FineTuneJob", "brief")
    tenant.wait(lambda: tenant.api.get("Job", tenant.name, "brief") is None, "its Job is deleted, too")
    assert tenant.get("Adapter", "support-1.0.0")["status"]["stage"] == "Ready"


def test_a_spot_job_prefers_spot_nodes_and_a_preemption_uses_up_no_retry(tenant: Tenant) -> None:
    tenant.job("cheap", spot=True, retries=0)
    first = tenant.running_pod("cheap")
    pod = tenant.get("Pod", first)
    terms = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert any(term["preference"]["matchExpressions"][0]["key"] == "karpenter.sh/capacity-type" for term in terms)
    assert any(item["key"] == "cloud.google.com/gke-spot" for item in pod["spec"]["tolerations"])
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": tenant.name}}
    tenant.api.call("POST", f"/api/v1/namespaces/{tenant.name}/pods/{first}/eviction", eviction)
    tenant.fail_pod(first, Reason.INTERRUPTED, "The pod was asked to end.", "")
    finish(tenant, "cheap", tenant.running_pod("cheap", but=(first,)))
    assert [item["reason"] for item in tenant.status("FineTuneJob", "cheap")["attempts"]] == ["Preempted", "Completed"]


def test_what_a_running_job_needs_comes_back_at_once(tenant: Tenant) -> None:
    tenant.job("first")
    tenant.running_pod("first")
    file, policy = tenant.job_file("first"), tenant.get("NetworkPolicy", "first-training")["spec"]
    tenant.api.delete("ConfigMap", tenant.name, "first-job")
    tenant.wait(lambda: tenant.api.get("ConfigMap", tenant.name, "first-job"), "the job file is there again", 10)
    assert tenant.job_file("first") == file
    tenant.api.delete("NetworkPolicy", tenant.name, "first-training")
    tenant.wait(lambda: tenant.api.get("NetworkPolicy", tenant.name, "first-training"), "the policy is there again", 15)
    tenant.api.patch("NetworkPolicy", tenant.name, "first-training", {"spec": {"ingress": [{}]}})
    tenant.wait(lambda: tenant.get("NetworkPolicy", "first-training")["spec"] == policy, "the policy is repaired", 15)
