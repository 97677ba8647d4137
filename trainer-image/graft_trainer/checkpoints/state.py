"""The state of training, taken out of transformers' Trainer and put back into it, bit by bit the same.

It knows nothing about files or the store. Of weights that are sharded (DTensors) each process takes its own part.
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
    """The parameters that training changes, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrapped(optimizer: Any) -> Any:
    """torch's own optimizer: accelerate wraps it."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(optimizer: Any) -> State:
    """What torch.optim keeps per parameter, in the order of the groups, and the groups' numbers.

    Not its state_dict(): load_state_dict() rounds the state to the parameter's type, which for 16-bit parameters is less
    than Adafactor's and bitsandbytes' states have.
    """
    inner = unwrapped(optimizer)
    return {
        "state": [dict(inner.state.get(parameter, {})) for parameter in _parameters(inner)],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
    }


def random_state() -> State:
    """The generators that training draws from: Python's, numpy's, torch's and this process's GPU's."""
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_weights(model: nn.Module, saved: "dict[str, Tensor | Shard]") -> None:
    """Write the weights into the model's own. KeyError and RuntimeError when they are not the model's."""
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
    """For checkpoint.unpack: tensors that were on a GPU go to `device`, others to memory of their own: `get` may give a
    view of the file."""

    def load(entry: dict[str, Any]) -> Any:
        tensor = get(entry["$tensor"])
        tensor = tensor.clone() if entry["device"] == "cpu" else tensor.to(device)
        return Shard(tensor) if entry["sharded"] else tensor

    return load


class Shard:
    """This process's part of a tensor whose other parts are elsewhere; it becomes whole beside its parameter."""

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
