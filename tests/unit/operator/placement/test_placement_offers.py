"""The resources that nodes offer: GPU memory by label or product name, shares and slices of GPUs, and quantities."""

import pytest
from graft.api.meta import Placement
from graft.api.quantity import binary, quantity
from graft.placement.offers import GpuKind, offers
from worlds.placement import gpu_node, node

GIB = 2**30


def kind_of(product: str, mib: int | None = None, **labels: str) -> GpuKind | None:
    return offers([gpu_node("gpu", product, mib, labels=labels)], Placement())[0].kind


@pytest.mark.parametrize(
    ("product", "gigabytes"),
    [
        ("Tesla-T4", 16),
        ("NVIDIA-A10", 24),
        ("NVIDIA-A10G", 24),
        ("NVIDIA-L4", 24),
        ("NVIDIA-L40S", 48),
        ("NVIDIA-A100-SXM4-40GB", 40),
        ("NVIDIA-A100-80GB-PCIe", 80),
        ("nvidia-tesla-a100", 40),
        ("NVIDIA-H100-80GB-HBM3", 80),
        ("NVIDIA-H100-PCIe", 80),
        ("NVIDIA-H100-NVL", 94),
        ("NVIDIA-H200", 141),
        ("Tesla-V100-SXM2-32GB", 32),
        ("Tesla-V100-SXM2", 16),
        ("NVIDIA-RTX-A6000", 48),
        ("NVIDIA-GeForce-RTX-4090", 24),
    ],
)
def test_without_a_memory_label_the_product_name_gives_the_memory(product: str, gigabytes: int) -> None:
    kind = kind_of(product)
    assert kind is not None
    assert 0.93 * gigabytes * GIB < kind.memory <= gigabytes * GIB
    assert kind.bf16 == ("T4" not in product and "V100" not in product)


def test_the_memory_label_overrides_the_product_name() -> None:
    kind = kind_of("NVIDIA-H100-80GB-HBM3", 81559)
    assert kind is not None and kind.memory == 81559 * 2**20


def test_an_unknown_product_without_a_memory_label_offers_no_gpus() -> None:
    assert kind_of("NVIDIA-Unheard-Of") is None
    assert offers([gpu_node("gpu", "NVIDIA-Unheard-Of", gpus=8)], Placement())[0].gpus == 0


def test_the_compute_capability_decides_bf16() -> None:
    old = kind_of("NVIDIA-Unheard-Of", 16384, **{"nvidia.com/gpu.compute.major": "7"})
    new = kind_of("NVIDIA-Unheard-Of", 16384, **{"nvidia.com/gpu.compute.major": "9"})
    assert old is not None and not old.bf16
    assert new is not None and new.bf16


def test_a_mig_slice_of_a_gpu_has_its_own_memory() -> None:
    labelled, named = kind_of("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", 4864), kind_of("NVIDIA-A100-SXM4-40GB-MIG-3g.20gb")
    assert labelled is not None and labelled.memory == 4864 * 2**20
    assert named is not None and 18 * GIB < named.memory < 20 * GIB


def test_a_time_sliced_share_of_a_gpu_has_a_share_of_its_memory() -> None:
    kind = kind_of("NVIDIA-A10-SHARED", 23028, **{"nvidia.com/gpu.replicas": "4"})
    assert kind is not None and kind.shared
    assert kind.memory == 23028 * 2**20 // 4


def test_without_gpu_feature_discovery_the_labels_of_cloud_providers_are_used() -> None:
    gke = node("gke", labels={"cloud.google.com/gke-accelerator": "nvidia-l4"}, **{"nvidia.com/gpu": "1"})
    eks = {"karpenter.k8s.aws/instance-gpu-name": "a10g", "karpenter.k8s.aws/instance-gpu-memory": "22888"}
    karpenter = node("eks", labels=eks, **{"nvidia.com/gpu": "4"})
    kinds = [offer.kind for offer in offers([gke, karpenter], Placement())]
    assert kinds[0] is not None and kinds[0].selector == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert kinds[1] is not None and kinds[1].memory == 22888 * 2**20
    assert kinds[1].selector == {"karpenter.k8s.aws/instance-gpu-name": "a10g"}


def test_nodes_without_gpus_offer_their_memory_and_cpus() -> None:
    [offer] = offers([node("plain", cpus="3920m", memory="16116152Ki")], Placement())
    assert (offer.cpus, offer.memory, offer.gpus, offer.kind) == (3.92, 16116152 * 1024, 0, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", 0.5), ("2", 2), (4, 4), ("4Gi", 4 * GIB), ("128Mi", 2**27), ("16116152Ki", 16116152 * 1024), ("1e3", 1000),
     ("1.5G", 1.5e9), ("100k", 1e5)],
)  # fmt: skip
def test_quantities_are_parsed(text: str | int, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


def test_an_invalid_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="'lots' is not a quantity"):
        quantity("lots")


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1Mi"), (4352 << 20, "4352Mi"), (5 << 30, "5Gi"), (2 << 40, "2Ti"), (3000 << 40, "3000Ti")]
)
def test_bytes_are_written_as_the_api_server_writes_them(size: int, text: str) -> None:
    assert binary(size) == text
