"""Check the header of adapter_model.safetensors, without loading the tensors (PURE except for reading the file).

Format: https://huggingface.co/docs/safetensors/index#format - 8 bytes little-endian length N, then N bytes of JSON with
the dtype, shape and offsets of each tensor, then the tensors.
"""

import json
from pathlib import Path
from typing import Any

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

HEADER_LIMIT = 16 * 1024 * 1024  # bytes; an adapter of 1000 modules has about 300 KB
DOWN = (".lora_A.weight", ".lora_embedding_A")  # [rank, inputs]


def check_weights(path: Path, max_rank: int) -> None:
    """Raise AdapterError unless the file is complete safetensors whose LoRA matrices have at most `max_rank` rows."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise _invalid(
                path, f"its header of {length} bytes does not fit in {size} bytes, or is above {HEADER_LIMIT} bytes"
            )
        header = stream.read(length)
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"its header is invalid: {error}") from error
    if not isinstance(tensors, dict):
        raise _invalid(path, "its header is invalid: it is not a JSON object")
    tensors.pop("__metadata__", None)
    if not tensors:
        raise _invalid(path, "it holds no tensors")
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, size - 8 - length, max_rank)


def _check_tensor(path: Path, name: str, tensor: Any, room: int, max_rank: int) -> None:
    try:
        (begin, end), shape = tensor["data_offsets"], [int(dimension) for dimension in tensor["shape"]]
        whole = 0 <= begin <= end <= room
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(path, f"tensor {name} is invalid: {error!r}") from error
    if not whole:
        raise _invalid(path, f"tensor {name} lies at bytes {begin}-{end} of the tensor data, which has {room} bytes")
    if name.endswith(DOWN) and shape and shape[0] > max_rank:
        raise AdapterError(
            AdapterReason.RANK_TOO_HIGH,
            f"{path.name}: {name} has rank {shape[0]}, above the deployment's limits.maxLoraRank {max_rank}",
        )


def _invalid(path: Path, what: str) -> AdapterError:
    return AdapterError(AdapterReason.WEIGHTS_INVALID, f"{path.name} is not a complete safetensors file: {what}")
