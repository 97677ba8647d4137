"""Sizing of deployments: one without resources gets the smallest GPUs of the cluster that fit, and keeps them."""

from collections.abc import Iterator
from typing import Any

import pytest
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.llama import LLAMA_2_7B, LLAMA_2_70B
from worlds.cluster.operator_process import SETTINGS, OperatorProcess
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import make_base_model


@pytest.fixture
def with_vllm(running: OperatorProcess) -> Iterator[None]:
    """Give the operator an image of vLLM for this test."""
    images: Any = SETTINGS["images"]
    running.stop()
    images["vllm"] = "graft/vllm:test"
    running.start()
    yield
    running.stop()
    del images["vllm"]
    running.start()


def serve(tenant: Tenant, name: str, facts: Object, **spec: Any) -> Fleet:
    base = make_base_model(tenant.api, tenant.store, f"{name}-{tenant.name}"[:60].strip("-"), facts=facts)
    fleet = Fleet(tenant, name)
    fleet.deploy([], baseModel=base, routes=[{"model": "base"}], **spec)
    return fleet


def pod_spec(tenant: Tenant, name: str) -> Any:
    tenant.wait(
        lambda: tenant.api.get("Deployment", tenant.name, name),
        f"the Deployment {name} exists",
        explain=lambda: str(tenant.status("AdapterDeployment", name)),
    )
    return tenant.get("Deployment", name)["spec"]["template"]["spec"]


def test_the_smallest_gpu_is_chosen_and_kept(tenant: Tenant, with_vllm: None) -> None:
    fleet = serve(tenant, "seven", LLAMA_2_7B, limits={"maxLoraRank": 16})
    pod = pod_spec(tenant, "seven")
    tenant.wait(lambda: fleet.status().get("sizing"), "the sizing is in the status")
    sizing = fleet.status()["sizing"]
    assert (sizing["gpu"], sizing["gpus"], sizing["engine"]) == ("NVIDIA-L4", 1, "vllm")
    assert sum(sizing["items"].values()) == sizing["totalBytes"] and "NVIDIA-L4" in sizing["message"]
    (container,) = pod["containers"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and container["command"][:2] == ["vllm", "serve"]
    assert container["command"][container["command"].index("--max-model-len") + 1] == "4096"
    assert fleet.pods(1)[0]["spec"]["nodeName"] == "node-0"

    # The node with this GPU is cordoned. Placement would now choose another GPU, but must not roll the running pods.
    tenant.api.patch("Node", None, "node-0", {"spec": {"unschedulable": True}})
    try:
        fleet.change(adapters=["support@latest"], drainSeconds=11)
        fleet.until("Accepted", "AdapterMissing")
        assert pod_spec(tenant, "seven") == pod
    finally:
        tenant.api.patch("Node", None, "node-0", {"spec": {"unschedulable": None}})
    tenant.api.delete("AdapterDeployment", tenant.name, "seven")


def test_a_large_model_uses_several_gpus_and_one_that_fits_nowhere_is_reported(tenant: Tenant, with_vllm: None) -> None:
    fleet = serve(tenant, "seventy", LLAMA_2_70B, quantization="none")
    command = pod_spec(tenant, "seventy")["containers"][0]["command"]
    assert command[command.index("--tensor-parallel-size") + 1] == "4"
    tenant.wait(lambda: fleet.status().get("sizing"), "the sizing is in the status")
    sizing = fleet.status()["sizing"]
    assert (sizing["gpus"], sizing["strategy"]) == (4, "distributed")
    tenant.api.delete("AdapterDeployment", tenant.name, "seventy")

    fleet = serve(
        tenant,
        "huge",
        LLAMA_2_70B,
        nodeSelector={"nvidia.com/gpu.product": "NVIDIA-L4"},
        quantization="none",
        limits={"maxModelLen": 131072},
    )
    refused = fleet.until("Accepted", "DoesNotFit")
    assert "GiB" in refused["message"] and "NVIDIA-L4" in refused["message"] and "spec.resources" in refused["message"]
    assert tenant.api.get("Deployment", tenant.name, "huge") is None
    assert fleet.status()["stage"] == "Waiting"
    assert fleet.routes().unavailable == refused["message"]
