"""The state of training: read from transformers' Trainer and restored into it, bit for bit equal.

It knows nothing about files or the store. If the weights are sharded (DTensors), each rank handles its own part.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

State = dict[str, Any]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrapped(optimizer: Any) -> Any:
    """Return torch's own optimizer from accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(optimizer: Any) -> State:
    """Return the optimizer's state per parameter, in the order of the groups, and the values of each group.

    It does not use state_dict(), because load_state_dict() rounds the state to the parameter's type. For 16-bit
    parameters, that type is less precise than the states of Adafactor and bitsandbytes.
    """
    inner = unwrapped(optimizer)
    return {
        "state": [dict(inner.state.get(parameter, {})) for parameter in _parameters(inner)],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
    }


def random_state() -> State:
    """Return the state of the random generators that training uses: Python's, numpy's, torch's and that of this
    process's GPU."""
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_weights(model: nn.Module, saved: "dict[str, Tensor | Shard]") -> None:
    """Copy the saved weights into the model. Raises KeyError or RuntimeError if they do not belong to this model."""
    with torch.no_grad():
        for name, parameter in trained_weights(model).items():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            value = saved[name]
            local.copy_(value.local if isinstance(value, Shard) else value)


def restore_optimizer(optimizer: Any, saved: State) -> None:
    inner = unwrapped(optimizer)
    for parameter, state in zip(_parameters(inner), saved["state"], strict=True):
        if state:
            inner.state[parameter] = {key: _place(value, parameter) for key, value in state.items()}
    for group, values in zip(inner.param_groups, saved["groups"], strict=True):
        group.update(values)


def restore_random(saved: State) -> None:
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def loader(get: Callable[[str], Tensor], device: torch.device) -> Callable[[dict[str, Any]], Any]:
    """Return a callback for checkpoint.unpack. Tensors that were on a GPU go to `device`.

    Tensors that were on the CPU are copied, because `get` may return a view of the file.
    """

    def load(entry: dict[str, Any]) -> Any:
        tensor = get(entry["$tensor"])
        tensor = tensor.clone() if entry["device"] == "cpu" else tensor.to(device)
        return Shard(tensor) if entry["sharded"] else tensor

    return load


class Shard:
    """This rank's part of a sharded tensor. Together with its parameter, it becomes a DTensor again."""

    def __init__(self, local: Tensor) -> None:
        self.local = local


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _place(value: Any, parameter: Any) -> Any:
    if not isinstance(value, Shard):
        return value
    return DTensor.from_local(
        value.local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
