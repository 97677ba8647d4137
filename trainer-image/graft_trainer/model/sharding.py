"""A model whose weights are sharded over the ranks (FSDP2): rank 0 sends each rank its part, and later collects all
parts."""

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def hollow(model: nn.Module) -> None:
    """Give a model on the meta device weights in host memory without values. They take no memory: the system allocates
    a page only when something writes to it, not when something reads it.

    Meta tensors would do for the sharding, but accelerate distinguishes weights by their addresses.
    """
    made: dict[int, Tensor] = {}  # shared weights stay shared
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
    """Send each rank its part of rank 0's weights, and all of rank 0's buffers. Rank 0 passes its unsharded weights by
    name as `whole`, the other ranks pass None. Every rank must call this, because the weights are sent one after
    another."""
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
    """Return a copy of the model without the memory of its weights. Copy it before sharding, which changes modules
    permanently."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def share_table(model: nn.Module) -> None:
    """Make embedding tables that share one weight one module, before the model is sharded. FSDP2 does not accept a
    weight in two groups, and accelerate puts the tables of T5's encoder and decoder into another group than the model's
    own table."""
    weight = model.get_input_embeddings().weight
    tables: dict[type[nn.Module], nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding) and child.weight is weight:
                setattr(module, name, tables.setdefault(type(child), child))


def reshard(model: nn.Module) -> None:
    """Return every rank to its part of the float32 weights, and nothing else. After a forward pass without a backward
    pass, some modules, such as the head, would stay unsharded and rounded to the type of the products."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return all unsharded weights in host memory if `keep`, else an empty dict. Every rank must call this, because the
    weights are collected one after another."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = value.cpu()
    return whole


def refill(model: nn.Module, empty: nn.Module, weights: dict[str, Tensor]) -> None:
    """Turn the sharded `model` into the unsharded model in host memory: it becomes `empty`, its shell(), filled with
    `weights`."""
    filled = {
        id(parameter): nn.Parameter(weights[name], parameter.requires_grad)
        for name, parameter in empty.named_parameters()
    }
    for module in empty.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a tied weight is the same object in both places
                module._parameters[name] = filled[id(parameter)]
    # All code that refers to the model has the unsharded model from here on.
    model.__class__ = empty.__class__
    model.__dict__ = empty.__dict__
