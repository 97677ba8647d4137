"""Move a model from host memory to GPUs with enough free memory, so that it can be measured there.

In training, the model may have been sharded over the GPUs of all ranks. Rank 0, which continues alone, has the GPUs of
its pod. The module knows nothing about methods or training.
"""

import gc
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from peft import PeftModel

from graft_trainer.run.failures import out_of_memory

log = logging.getLogger(__name__)
SHARE = 0.8  # share of a GPU's free memory that weights may take; the rest is for activations, KV caches and logits
ENDING = 60.0  # seconds for the pod's other processes to end: only then is their GPUs' memory free
LOOK = 0.5  # seconds between two checks of the free memory
GIB = 2**30


def plan(model: Any, free: Sequence[int]) -> dict[str, int]:
    """Return module -> GPU (PURE): the whole model ("") on the first GPU with enough memory, else whole blocks spread
    over all GPUs, else an empty dict. `free` is the free memory of each GPU in bytes."""
    weights = weight_bytes(model)
    room = {gpu: int(SHARE * size) for gpu, size in enumerate(free)}
    for gpu, size in room.items():
        if weights <= size:
            return {"": gpu}
    if weights > sum(room.values()):
        return {}
    inner = _inner(model)
    blocks = sorted(getattr(inner, "_no_split_modules", None) or ())
    spread: dict[str, int] = infer_auto_device_map(inner, max_memory=dict(room), no_split_module_classes=blocks)
    return spread if set(spread.values()) <= room.keys() else {}


def place(model: Any) -> Any:
    """Move the model from host memory to a GPU, or spread it over several GPUs, and return it. If it fits nowhere, it
    stays in host memory. A model that is on a GPU already stays there.

    A spread model takes inputs on `model.device` and returns its outputs there. All its weights are on GPUs, but its
    modules have accelerate's hooks until release().
    """
    gpus = _gpus()
    if not gpus or model.device.type != "cpu":
        return model
    _free_unused()
    deadline = time.monotonic() + ENDING
    # Querying another GPU takes memory on it, so this process's own GPU is checked first.
    planned = plan(model, _free_memory(1))
    while not planned and gpus > 1:
        planned = plan(model, _free_memory(gpus))
        if planned or time.monotonic() > deadline:
            break
        time.sleep(LOOK)
    if planned and _move(model, planned):
        log.info("the model is on GPU %s", ", ".join(map(str, sorted(set(planned.values())))))
        return model
    log.warning(
        "the model's %.1f GiB fit neither on one GPU of the pod nor on all %d together: the model stays in host memory, where "
        "measuring it is slow. Use GPUs with more memory or more GPUs per node to make it fast",
        weight_bytes(model) / GIB,
        gpus,
    )
    return model


def weight_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def release(model: Any) -> None:
    """Free the model's weights, even if other code still refers to the model."""
    remove_hook_from_module(model, recurse=True)  # the hooks hold weights, too
    model.to("meta")
    _free_unused()


def _move(model: Any, planned: dict[str, int]) -> bool:
    """Move the model as planned. Return whether all weights are on the GPUs now. If not, all are in host memory as
    before."""
    try:
        if "" in planned:
            _to(model, planned[""])
        else:
            inner = _inner(model)
            _dispatch(inner, planned)
            if inner is not model:
                _follow(model)
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
        log.warning("the model does not fit on the GPUs after all: %s", error)
    # Not in the except block: there, the exception's frames still hold weights.
    remove_hook_from_module(model, recurse=True)
    model.to("cpu")
    _free_unused()
    return False


def _inner(model: Any) -> Any:
    """Return the model that peft has wrapped. An adapter is inside its blocks."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _follow(model: Any) -> None:
    """Move peft's parameters outside the blocks (a tuned prompt) to the device of the inputs."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "cpu":
                module._parameters[name] = torch.nn.Parameter(parameter.to(model.device), parameter.requires_grad)


def _gpus() -> int:
    """Return the number of the pod's GPUs. A process sees all of them, and its own is the first."""
    return int(torch.cuda.device_count())


def _free_memory(gpus: int) -> list[int]:
    return [int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(gpus)]


def _to(model: Any, gpu: int) -> None:
    model.to(f"cuda:{gpu}")


def _dispatch(model: Any, spread: dict[str, int]) -> None:
    skip = getattr(model, "_skip_keys_device_placement", None)  # each layer's part of the cache is on the layer's GPU
    dispatch_model(model, device_map=spread, main_device=min(spread.values()), skip_keys=skip)


def _free_unused() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
