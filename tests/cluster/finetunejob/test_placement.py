"""Placement of training jobs on GPUs.

A job without resources gets the smallest GPUs of the cluster that fit. If none fit, the job reports it before any pod runs.
"""

import json
from typing import Any

from graft.contracts.progress import EXIT_CODES, Reason, Termination
from worlds.cluster.api import Object
from worlds.cluster.llama import LLAMA_2_7B, LLAMA_2_70B
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import make_base_model


def model(tenant: Tenant, facts: Object, size: str) -> str:
    return make_base_model(tenant.api, tenant.store, f"llama-{size}-{tenant.name}"[:60].strip("-"), facts=facts)


def placed(tenant: Tenant, job: str, **data: Any) -> tuple[Object, Object, Object]:
    """Pass the preflight checks and wait for the Job. Return (status.sizing, container resources, node selector)."""
    tenant.pass_preflight(job, **data)
    tenant.wait(
        lambda: tenant.api.get("Job", tenant.name, job),
        f"the Job of {job} exists",
        explain=lambda: str(tenant.status("FineTuneJob", job)),
    )
    pod: Any = tenant.get("Job", job)["spec"]["template"]["spec"]
    return tenant.status("FineTuneJob", job)["sizing"], pod["containers"][0]["resources"], pod.get("nodeSelector", {})


def test_the_smallest_gpu_that_fits_is_chosen(tenant: Tenant) -> None:
    seven = model(tenant, LLAMA_2_7B, "7b")
    tenant.job("small", baseModel=seven, resources=None, method={"qlora": {}}, training={"maxLength": 1024})
    sizing, resources, selector = placed(tenant, "small")
    assert resources["requests"]["ephemeral-storage"] == f"{sizing['nodeDiskBytes'] // 2**30}Gi"
    assert sizing["gpu"] == "NVIDIA-L4" and sizing["gpusPerNode"] == 1 and sizing["source"] == "estimate"
    assert sum(sizing["items"].values()) == sizing["totalBytes"] <= sizing["gpuMemoryBytes"] == 23034 * 2**20
    assert resources["limits"]["nvidia.com/gpu"] == "1" and selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert tenant.job_file("small").choice.micro_batch == sizing["microBatch"]
    pod = tenant.get("Pod", tenant.running_pod("small"))
    assert pod["spec"]["nodeName"] == "node-0"

    tenant.job(
        "larger", adapter="larger", baseModel=seven, resources=None, method={"full": {}}, training={"maxLength": 1024}
    )
    sizing, resources, selector = placed(tenant, "larger")
    assert sizing["gpu"] == "NVIDIA-A100-SXM4-80GB" and sizing["gpusPerNode"] > 1 and sizing["sharding"] == "fsdp"
    assert resources["limits"]["nvidia.com/gpu"] == str(sizing["gpusPerNode"])
    assert tenant.job_file("larger").pods.processes_per_node == sizing["gpusPerNode"]


def test_a_preflight_job_checks_the_dataset_before_gpus_are_requested(tenant: Tenant) -> None:
    seven = model(tenant, LLAMA_2_7B, "7b")
    tenant.job("typo", baseModel=seven, resources=None, method={"qlora": {}}, retries=5, queue="gpus")
    pod = tenant.running_pod("typo", preflight=True)
    shown = tenant.until("FineTuneJob", "typo", "Succeeded", "Preparing", says="before GPUs are requested")
    assert shown["status"] == "Unknown" and tenant.status("FineTuneJob", "typo")["sizing"]["gpu"] == "NVIDIA-L4"
    spec: Any = tenant.get("Pod", pod)["spec"]
    assert spec["containers"][0]["command"][-1] == "preflight" and "nodeSelector" not in spec
    assert not any("nvidia.com/gpu" in json.dumps(item["resources"]) for item in spec["containers"])
    text = Termination(reason=Reason.DATASET_INVALID, message="line 7: not JSON.", remedy="Mend it.").json_text()
    tenant.end_pod(pod, EXIT_CODES[Reason.DATASET_INVALID], text, container="prepare")
    ended = tenant.until("FineTuneJob", "typo", "Succeeded", "DatasetInvalid")
    assert ended["message"] == "line 7: not JSON. Mend it."
    assert tenant.api.get("Job", tenant.name, "typo") is None
    tenant.api.delete("FineTuneJob", tenant.name, "typo")
    tenant.gone("Job", "typo-preflight")


def test_the_measured_example_lengths_decide_the_sizing(tenant: Tenant) -> None:
    seven = model(tenant, LLAMA_2_7B, "7b")
    tenant.job("short", baseModel=seven, resources=None, method={"qlora": {}}, training={"maxLength": 4096})
    tenant.running_pod("short", preflight=True)
    before = tenant.status("FineTuneJob", "short")["sizing"]
    tenant.api.patch("FineTuneJob", tenant.name, "short", {"spec": {"suspend": True}})
    tenant.until("FineTuneJob", "short", "Succeeded", "Suspended")
    tenant.api.patch("FineTuneJob", tenant.name, "short", {"spec": {"suspend": False}})
    tenant.until("FineTuneJob", "short", "Succeeded", "Preparing")
    sizing, *_ = placed(tenant, "short", examples=500, maxTokens=256)
    assert (before["gradientCheckpointing"], sizing["gradientCheckpointing"]) == (True, False)
    assert tenant.job_file("short").choice.micro_batch == sizing["microBatch"]
    pod = tenant.running_pod("short")
    tenant.until("FineTuneJob", "short", "Succeeded", "Training")
    status = tenant.status("FineTuneJob", "short")
    assert [item["pod"] for item in status["attempts"]] == [pod]  # the preflight pod does not count as an attempt


def test_a_queued_job_requests_no_ephemeral_storage(tenant: Tenant) -> None:
    seven = model(tenant, LLAMA_2_7B, "7b")
    tenant.job("queued", baseModel=seven, resources=None, method={"qlora": {}}, queue="gpus")
    sizing, resources, _ = placed(tenant, "queued")
    assert sizing["nodeDiskBytes"] and set(resources["requests"]) == {"cpu", "memory"}
    tenant.until("FineTuneJob", "queued", "Succeeded", "Queued")


def test_a_job_that_fits_nowhere_reports_its_memory_and_the_gpus(tenant: Tenant) -> None:
    seventy = model(tenant, LLAMA_2_70B, "70b")
    tenant.job("giant", baseModel=seventy, resources=None, method={"full": {}})
    refused = tenant.until("FineTuneJob", "giant", "Accepted", "DoesNotFit")
    assert refused["status"] == "False" and "GiB" in refused["message"] and "A100" in refused["message"]
    assert tenant.status("FineTuneJob", "giant")["stage"] == "Waiting"
    assert tenant.api.get("Job", tenant.name, "giant") is None


def test_explicit_resources_are_used_unchanged(tenant: Tenant) -> None:
    seven = model(tenant, LLAMA_2_7B, "7b")
    given = {"requests": {"cpu": "2", "memory": "16Gi"}, "limits": {"memory": "16Gi", "nvidia.com/gpu": 1}}
    tenant.job(
        "own",
        baseModel=seven,
        resources=given,
        nodeSelector={"nvidia.com/gpu.product": "NVIDIA-L4"},
        method={"full": {}},
    )
    sizing, resources, selector = placed(tenant, "own")
    assert (resources["limits"]["memory"], resources["limits"]["nvidia.com/gpu"]) == ("16Gi", "1")
    assert selector == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert sizing["source"] == "spec" and sizing["totalBytes"] > 23034 * 2**20
    assert "GiB" in sizing["message"]  # a warning: full fine-tuning of 7B does not fit an L4
