"""Where a model goes that is in host memory and is to be measured: where its weights fit beside what is there already.

Training may have held it spread over the GPUs of all processes; the one that goes on alone has the GPUs of its pod. It
knows nothing about methods or training.
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
SHARE = 0.8  # of a GPU's free memory that weights may take; the rest is for activations, answers' caches and logits
ENDING = 60.0  # seconds for the pod's other processes to end: their GPUs' memory is free only then
LOOK = 0.5  # seconds between looks at it
GIB = 2**30


def plan(model: Any, free: Sequence[int]) -> dict[str, int]:
    """Module -> the GPU that it goes to: all of the model ("") to the first GPU that can take it, else by whole blocks to all
    of them, else none (PURE). `free` are the bytes that are free on each GPU."""
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
    """Move the model from host memory to a GPU, or spread it over several; where it fits nowhere it stays. One that is on a
    GPU already stays there, too.

    One that is spread takes inputs on `model.device` and gives its outputs there. No weight of it is elsewhere than on a GPU,
    but its modules have accelerate's hooks until release().
    """
    gpus = _gpus()
    if not gpus or model.device.type != "cpu":
        return model
    _free_unused()
    deadline = time.monotonic() + ENDING
    # To look at another GPU takes memory there, so this process's own is asked first.
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
        "the model's %.1f GiB fit on no GPU of the pod and not on all %d together: it stays in host memory, where it is "
        "measured slowly. GPUs with more memory, or more of them per node, make it fast",
        weight_bytes(model) / GIB,
        gpus,
    )
    return model


def weight_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def release(model: Any) -> None:
    """Free the weights, whoever still holds the model."""
    remove_hook_from_module(model, recurse=True)  # they hold weights, too
    model.to("meta")
    _free_unused()


def _move(model: Any, planned: dict[str, int]) -> bool:
    """Whether all weights are on the GPUs now; if not, all are in host memory as before."""
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
    # Here and not above: the exception's frames hold weights.
    remove_hook_from_module(model, recurse=True)
    model.to("cpu")
    _free_unused()
    return False


def _inner(model: Any) -> Any:
    """The model that peft has wrapped: an adapter is within its blocks."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _follow(model: Any) -> None:
    """Put what peft has beside the blocks, a prompt, where the inputs go."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "cpu":
                module._parameters[name] = torch.nn.Parameter(parameter.to(model.device), parameter.requires_grad)


def _gpus() -> int:
    """Of this pod, which are those that a process sees; its own is the first."""
    return int(torch.cuda.device_count())


def _free_memory(gpus: int) -> list[int]:
    return [int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(gpus)]


def _to(model: Any, gpu: int) -> None:
    model.to(f"cuda:{gpu}")


def _dispatch(model: Any, spread: dict[str, int]) -> None:
    skip = getattr(model, "_skip_keys_device_placement", None)  # each layer's part of the cache is beside the layer
    dispatch_model(model, device_map=spread, main_device=min(spread.values()), skip_keys=skip)


def _free_unused() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
