"""The base model without its weights, and whether an adapter's files fit it.

Combining and checking adapters needs the base model's modules and their shapes only. Those come from config.json; every weight is
one zero that is seen in the weight's shape, so a model of any size takes no memory and nothing is downloaded. (On torch's meta device
peft would put the adapters' own weights there, too.)
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

from graft_trainer.data.tokens import Task
from graft_trainer.model.adapterconfig import invalid
from graft_trainer.model.basemodel import load_config
from graft_trainer.model.model import AUTO_CLASSES
from graft_trainer.run.failures import out_of_memory

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Fit:
    """What an adapter is on its base model."""

    rank: int | None
    alpha: float | None
    virtual_tokens: int | None
    targets: list[str]  # the modules' last names


def base_of_shapes(folder: Path, name: str, task: Task) -> Any:
    """The model that the config.json in `folder` describes, of zeros that take no memory."""
    config = load_config(folder, name)
    with torch.device("meta"):
        model: Any = AUTO_CLASSES[task].from_config(config)
    made: dict[int, nn.Parameter] = {}  # weights that are shared stay so
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(zeros, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model


def check_adapter(folder: Path, config: dict[str, Any], base: Any, who: str, base_name: str) -> Fit:
    """What the adapter in `folder` is, as its (reduced) config says. Failure(AdapterInvalid) unless its tensors are exactly those
    that the config makes of the base model, and finite."""
    fields = {key: value for key, value in config.items() if key != "peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on shared embeddings
        try:
            adapter: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**fields)
            model = get_peft_model(base, adapter)
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise invalid(
                f"{who} does not fit the base model {base_name}: {error}",
                "Set spec.baseModel to the model that it was tuned on.",
            ) from error
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    check_tensors(folder / "adapter_model.safetensors", shapes, who, base_name)
    alpha = config.get("lora_alpha")
    return Fit(
        rank=config.get("r"),
        alpha=float(alpha) if alpha is not None else None,
        virtual_tokens=config.get("num_virtual_tokens"),
        targets=sorted({name.rpartition(".")[2] for name in getattr(model.base_model, "targeted_module_names", [])}),
    )


def check_tensors(path: Path, shapes: dict[str, list[int]], who: str, base_name: str) -> None:
    """Failure(AdapterInvalid) unless the file has exactly these tensors, of floats that are numbers."""
    remedy = "Set spec.baseModel to the model that it was tuned on."
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if missing := sorted(shapes.keys() - found.keys()):
                raise invalid(f"{who} lacks {len(missing)} tensors for {base_name}, the first is {missing[0]}", remedy)
            if unknown := sorted(found.keys() - shapes.keys()):
                raise invalid(
                    f"{who} has {len(unknown)} tensors that do not belong to its config on {base_name}, the first is {unknown[0]}",
                    remedy,
                )
            for name, shape in sorted(found.items()):
                if shape != shapes[name]:
                    raise invalid(f"{who}: {name} is {shape}, on {base_name} it would be {shapes[name]}", remedy)
            for name in found:
                check_numbers(file, name, who)
    except (SafetensorError, OSError) as error:
        raise invalid(f"{who}: {path.name} is no whole safetensors file: {error}") from error


def check_numbers(file: Any, name: str, who: str) -> None:
    """Failure(AdapterInvalid) when a tensor of an open safetensors file holds no floats, or NaN or infinity."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise invalid(f"{who}: {name} is of the type {dtype}; weights are F32, F16 or BF16")
    if not bool(torch.isfinite(file.get_tensor(name)).all()):
        raise invalid(f"{who}: {name} holds NaN or infinity: the training has diverged")
