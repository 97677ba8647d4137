"""The nodes that a job can run on (PURE): GPUs by kind, memory and CPUs, from Node objects of the Kubernetes API.

A node is an offer if the scheduler could ever put the job's pod there. It is Ready and not cordoned, it has the labels
of the job's nodeSelector, and the job tolerates its taints. GPUs that are busy now count too: the pod waits for them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.api.meta import GPU, GPU_TOLERATION, Placement, Toleration
from graft.api.quantity import quantity

Node = dict[str, Any]

# Labels of GPU feature discovery. Where it does not run, GKE's and Karpenter's labels are used.
PRODUCT_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator", "karpenter.k8s.aws/instance-gpu-name")
MEMORY_LABELS = ("nvidia.com/gpu.memory", "karpenter.k8s.aws/instance-gpu-memory")  # MiB

# GiB by a part of the product's name, for nodes without a memory label. The first match counts. If a product is sold in
# several sizes and the name does not show the size, the smaller size counts.
MEMORY_BY_PRODUCT = (
    ("gh200", 96), ("h200", 141), ("h100-nvl", 94), ("h100", 80), ("h20", 96), ("h800", 80), ("b300", 268), ("b200", 180),
    ("a100", 40), ("a800", 80), ("a10g", 24), ("a10", 24), ("a16", 16), ("a2", 16), ("a30", 24), ("a40", 48),
    ("l40", 48), ("l4", 24), ("t4", 16), ("v100", 16), ("p100", 16), ("p40", 24), ("p4", 8), ("k80", 12),
    ("rtx-pro-6000", 96), ("rtx-6000-ada", 48), ("rtx-a6000", 48), ("rtx-a5000", 24), ("rtx-a4000", 16),
    ("rtx-5090", 32), ("rtx-4090", 24), ("rtx-3090", 24),
)  # fmt: skip
WITHOUT_BF16 = ("t4", "v100", "p100", "p40", "p4", "k80", "rtx-8000", "rtx-2080", "titan")  # before Ampere
# The share of the size in the name that the device reports: a T4 of 16 GB 15360 MiB, an A10 of 24 GB 23028 MiB.
SHOWN = 0.94
USABLE = 0.98  # share of the reported memory: the driver keeps a part


@dataclass(frozen=True)
class GpuKind:
    """One GPU product, the same on all its nodes."""

    product: str
    memory: int  # bytes of one GPU
    bf16: bool
    selector: dict[str, str] = field(default_factory=dict, compare=False)  # the label of its nodes
    shared: bool = False  # time-sliced or MPS: a pod gets one share, because two shares may be of the same GPU
    shares: int = 1  # shares of one such GPU

    @property
    def usable(self) -> int:
        """Bytes that a process can allocate."""
        return int(self.memory * USABLE)


@dataclass(frozen=True)
class NodeOffer:
    """The offer of one node. Sizes are in bytes."""

    name: str
    cpus: float
    memory: int
    gpus: int = 0
    kind: GpuKind | None = None


def offers(nodes: Iterable[Node], placement: Placement, spot_taints: Sequence[str] = ()) -> list[NodeOffer]:
    """Return the nodes that the job's pods can run on. `spot_taints` are the taint keys that spot jobs tolerate."""
    found = []
    for node in nodes:
        gpus = int(_allocatable(node).get(GPU, 0))
        tolerations = list(placement.tolerations or [])
        tolerations += [Toleration(key=key, operator="Exists") for key in spot_taints]
        if gpus:
            tolerations.append(GPU_TOLERATION)
        if _usable(node, placement.node_selector or {}, tolerations):
            found.append(_offer(node, gpus))
    return found


def _allocatable(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = node.get("status", {}).get("allocatable") or {}
    return found


def _usable(node: Node, selector: dict[str, str], tolerations: list[Toleration]) -> bool:
    spec, labels = node.get("spec") or {}, node["metadata"].get("labels") or {}
    ready = any(
        item["type"] == "Ready" and item["status"] == "True" for item in node.get("status", {}).get("conditions") or []
    )
    taints = [item for item in spec.get("taints") or [] if item.get("effect") in {"NoSchedule", "NoExecute"}]
    return (
        ready
        and not spec.get("unschedulable")
        and all(labels.get(key) == value for key, value in selector.items())
        and all(any(_tolerates(toleration, taint) for toleration in tolerations) for taint in taints)
    )


def _tolerates(toleration: Toleration, taint: dict[str, Any]) -> bool:
    """Return whether a toleration matches, as k8s.io/api's ToleratesTaint: no effect matches all, Exists without a key
    matches all."""
    if toleration.effect is not None and toleration.effect != taint["effect"]:
        return False
    exists = toleration.operator == "Exists"
    if not toleration.key:
        return exists
    return toleration.key == taint["key"] and (exists or (toleration.value or "") == (taint.get("value") or ""))


def _offer(node: Node, gpus: int) -> NodeOffer:
    allocatable = _allocatable(node)
    name = str(node["metadata"]["name"])
    cpus, memory = quantity(allocatable.get("cpu", 0)), int(quantity(allocatable.get("memory", 0)))
    kind = _kind(node["metadata"].get("labels") or {}) if gpus else None
    return NodeOffer(name, cpus, memory, gpus if kind else 0, kind)


def _kind(labels: dict[str, str]) -> GpuKind | None:
    """Return the GPU product, or None if its memory is unknown."""
    label = next((key for key in PRODUCT_LABELS if labels.get(key)), None)
    product = labels[label] if label else "GPU"
    plain = product.lower().replace(" ", "-").replace("_", "-")
    memory = next((int(labels[key]) * 2**20 for key in MEMORY_LABELS if labels.get(key, "").isdigit()), None)
    memory = memory or _memory_by_name(plain)
    if memory is None:
        return None
    shares = int(labels.get("nvidia.com/gpu.replicas", "1") or 1)
    shared = plain.endswith("-shared") or labels.get("nvidia.com/gpu.sharing-strategy", "none") != "none"
    if shared:
        memory //= max(1, shares)
    major = labels.get("nvidia.com/gpu.compute.major", "")
    bf16 = int(major) >= 8 if major.isdigit() else not _named(plain, WITHOUT_BF16)
    selector = {label: product} if label else {}
    return GpuKind(product, memory, bf16, selector, shared, max(1, shares) if shared else 1)


def _memory_by_name(plain: str) -> int | None:
    """Return the bytes by the size in the name (for a MIG slice, the slice's size), or else by the table."""
    slice_ = re.search(r"\d+g\.(\d+)gb", plain)
    size = slice_ or re.search(r"(\d+)gb", plain)
    if size is not None:
        return int(int(size[1]) * 2**30 * SHOWN)
    known = next((gib for part, gib in MEMORY_BY_PRODUCT if _named(plain, (part,))), None)
    return int(known * 2**30 * SHOWN) if known is not None else None


def _named(plain: str, parts: Iterable[str]) -> bool:
    """Return whether the name contains a part as a whole word: a10 is in nvidia-a10, not in nvidia-a100."""
    return any(re.search(rf"(^|-){re.escape(part)}(-|s(-|$)|$)", plain) for part in parts)
