"""Data of the placement tests: configs of known models, and nodes as the Kubernetes API returns them."""

from typing import Any


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return the config.json of a Llama 2 model."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }


LLAMA_2 = {
    "7B": llama(4096, 11008, 32, 32, 32),
    "13B": llama(5120, 13824, 40, 40, 40),
    "70B": llama(8192, 28672, 80, 64, 8),
}
TINY = llama(256, 688, 4, 4, 2) | {"vocab_size": 1536, "max_position_embeddings": 512}


def node(
    name: str,
    *,
    cpus: str = "64",
    memory: str = "1000Gi",
    labels: dict[str, str] | None = None,
    taints: list[dict[str, str]] | None = None,
    ready: str = "True",
    cordoned: bool = False,
    **resources: str,
) -> dict[str, Any]:
    """Return a node. `resources` are further allocatable resources by name."""
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | (labels or {})},
        "spec": {"unschedulable": cordoned, "taints": taints or []},
        "status": {
            "conditions": [{"type": "Ready", "status": ready}],
            "allocatable": {"cpu": cpus, "memory": memory, "pods": "110"} | resources,
        },
    }


def gpu_node(name: str, product: str, mib: int | None = None, *, gpus: int = 1, **fields: Any) -> dict[str, Any]:
    """Return a node with the labels of GPU feature discovery. If `mib` is None, the memory label is missing."""
    labels = {"nvidia.com/gpu.product": product, "nvidia.com/gpu.count": str(gpus)} | fields.pop("labels", {})
    if mib is not None:
        labels["nvidia.com/gpu.memory"] = str(mib)
    return node(name, labels=labels, **{"nvidia.com/gpu": str(gpus)}, **fields)
