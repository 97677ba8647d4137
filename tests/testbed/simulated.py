"""Simulated nodes: kwok plays the kubelet of each node.

A pod that is bound to a node starts at once. It runs no containers, and ends when a test ends it.
"""

import json
from pathlib import Path
from typing import Any

from testbed.binaries import binary
from testbed.controlplane import ControlPlane
from testbed.shell import tail, wait_for

STAGES = Path(__file__).parent / "manifests" / "kwok-stages.yaml"
CAPACITY = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8", "pods": "500"}
# The nodes get these GPUs in turn. GPU feature discovery would label them so: product, and MiB of one GPU.
GPUS = (("NVIDIA-L4", 23034), ("NVIDIA-A100-SXM4-80GB", 81920))


def add_nodes(plane: ControlPlane, count: int = 2) -> None:
    """Start kwok and create nodes. Wait until they are Ready."""
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
