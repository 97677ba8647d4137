"""A model whose weights are spread over the processes (FSDP2): dealt out by the first one, and put together again in it."""

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def hollow(model: nn.Module) -> None:
    """Give a model on the meta device weights in host memory without values: the system gives no page that nobody writes to.

    Nor does reading take any. A meta tensor would do for the sharding, but accelerate tells weights apart by their addresses.
    """
    made: dict[int, Tensor] = {}  # weights that are shared stay so
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = made[id(tensor)]


def deal(model: nn.Module, whole: dict[str, Tensor] | None) -> None:
    """Give each process its part of the weights, and all buffers, that the first one has; it passes the `whole` weights by
    name. Every process must take part, one weight after another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if whole is not None:
                value = whole[name].to(part.device, parameter.dtype)
            else:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=part.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
            else:
                distributed.broadcast(value, 0)
            part.copy_(value)
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def shell(model: nn.Module) -> nn.Module:
    """The model without the memory of its weights, made before it is sharded: sharding changes modules for good."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def share_table(model: nn.Module) -> None:
    """Make the embedding tables that are one weight one module, too, before the model is sharded. FSDP2 takes no weight into
    two groups, and accelerate leaves the tables of T5's encoder and decoder in another one than the model's own."""
    weight = model.get_input_embeddings().weight
    tables: dict[type[nn.Module], nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding) and child.weight is weight:
                setattr(module, name, tables.setdefault(type(child), child))


def reshard(model: nn.Module) -> None:
    """Each process has its part of the float32 weights again, and nothing else. After a forward pass that no backward pass
    follows some modules, the head among them, would stay whole, and rounded to the type of the products."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All weights in host memory, whole, where `keep`; every process must take part, one weight after another."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = value.cpu()
    return whole


def refill(model: nn.Module, empty: nn.Module, weights: dict[str, Tensor]) -> None:
    """Turn the sharded `model` into the plain one, in host memory: it becomes its shell, with the weights."""
    filled = {
        id(parameter): nn.Parameter(weights[name], parameter.requires_grad)
        for name, parameter in empty.named_parameters()
    }
    for module in empty.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a tied weight is the same one in both places
                module._parameters[name] = filled[id(parameter)]
    # Whoever holds the model has the plain one from here on.
    model.__class__ = empty.__class__
    model.__dict__ = empty.__dict__
