"""Simulated nodes: kwok plays the kubelet of each; a pod that is bound starts at once, and ends when a test says so."""

import json
from pathlib import Path
from typing import Any

from testbed.binaries import binary
from testbed.controlplane import ControlPlane
from testbed.shell import tail, wait_for

STAGES = Path(__file__).parent / "manifests" / "kwok-stages.yaml"
CAPACITY = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8", "pods": "500"}
# The GPUs of the nodes in turn, as GPU feature discovery labels them: product and MiB of one.
GPUS = (("NVIDIA-L4", 23034), ("NVIDIA-A100-SXM4-80GB", 81920))


def add_nodes(plane: ControlPlane, count: int = 2) -> None:
    """Start kwok and make nodes; Ready afterwards."""
    plane.processes.start(
        "kwok",
        [
            binary("kwok"),
            f"--kubeconfig={plane.kubeconfig}",
            f"--config={STAGES}",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
        ],
    )
    manifest = plane.state / "nodes.json"
    nodes = [_node(f"node-{number}", *GPUS[number % len(GPUS)]) for number in range(count)]
    manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": nodes}))
    plane.kubectl("apply", "-f", str(manifest))

    def ready() -> bool:
        plane.processes.require("kwok")
        path = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        return plane.kubectl("get", "nodes", "-o", path, check=False).split() == ["True"] * count

    wait_for(ready, 60, "the simulated nodes are Ready", lambda: tail(plane.processes.logs / "kwok.log"))


def _node(name: str, product: str, memory: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "nvidia.com/gpu.product": product,
                "nvidia.com/gpu.memory": str(memory),
                "nvidia.com/gpu.count": CAPACITY["nvidia.com/gpu"],
            },
        },
        "status": {"allocatable": CAPACITY, "capacity": CAPACITY},
    }
