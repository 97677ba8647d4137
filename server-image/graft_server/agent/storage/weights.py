"""Check the header of adapter_model.safetensors, without loading the tensors (PURE except for reading the file).

Format: https://huggingface.co/docs/safetensors/index#format - 8 bytes little-endian length N, then N bytes of JSON with
the dtype, shape and offsets of each tensor, then the tensors.
"""

from pathlib import Path
from typing import Any

from graft.bounded import Limits, OutOfBounds, parse_json

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

# An adapter of 1000 modules has a header of about 300 KB, with 8 values for each of its 2000 tensors. Mixtures of
# experts have up to 40,000 tensors.
HEADER = Limits(size=16 * 1024 * 1024, depth=4, values=500_000)
NAME_CHARS, MESSAGE_CHARS = 200, 1000  # of what a message quotes
DOWN = (".lora_A.weight", ".lora_embedding_A")  # [rank, inputs]


def check_weights(path: Path, max_rank: int) -> None:
    """Raise AdapterError unless the file is complete safetensors whose LoRA matrices have at most `max_rank` rows."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER.size, size - 8):
            raise _invalid(
                path, f"its header of {length} bytes does not fit in {size} bytes, or is above {HEADER.size} bytes"
            )
        header = stream.read(length)
    try:
        tensors = parse_json(header, HEADER, "its header")
    except OutOfBounds as error:
        raise _invalid(path, str(error)) from error
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _invalid(path, f"tensor {name[:NAME_CHARS]} is invalid: {error!r}"[:MESSAGE_CHARS]) from error
    if not whole:
        raise _invalid(
            path, f"tensor {name[:NAME_CHARS]} lies at bytes {begin}-{end} of the tensor data, which has {room} bytes"
        )
    if name.endswith(DOWN) and shape and shape[0] > max_rank:
        raise AdapterError(
            AdapterReason.RANK_TOO_HIGH,
            f"{path.name}: {name[:NAME_CHARS]} has rank {shape[0]}, above the deployment's limits.maxLoraRank {max_rank}",
        )


def _invalid(path: Path, what: str) -> AdapterError:
    return AdapterError(AdapterReason.WEIGHTS_INVALID, f"{path.name} is not a complete safetensors file: {what}")
