"""Build the base model without its weights, and check whether an adapter's files fit it.

Combining and checking adapters needs only the base model's modules and their shapes, which come from config.json. Every
weight is a single zero, expanded to the weight's shape. So a model of any size takes no memory, and nothing is
downloaded. (On torch's meta device, peft would put the adapters' own weights there, too.)
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graft.contracts.progress import Reason
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

from graft_trainer.data.tokens import Task
from graft_trainer.model.adapterconfig import invalid
from graft_trainer.model.basemodel import load_config
from graft_trainer.model.resolving import check_modules, name_as_served, resolved_config, without_copies
from graft_trainer.model.wrappers import served_class, tuned_class
from graft_trainer.run.failures import Failure, out_of_memory

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Fit:
    """The properties of an adapter on its base model."""

    rank: int | None
    alpha: float | None
    virtual_tokens: int | None
    targets: list[str]  # the last parts of the modules' names
    config: dict[str, Any]  # with plain lists of modules


def base_of_shapes(folder: Path, name: str, task: Task, *, served: bool = True) -> Any:
    """Build the model that config.json in `folder` describes. Its weights are zeros that take no memory.

    It is the model that servers build, whose names an adapter has, or without `served` the model that is tuned.
    """
    config = load_config(folder, name)
    kind = served_class(config, task) if served else tuned_class(config, task)
    try:
        with torch.device("meta"):
            model: Any = kind.from_config(config)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise cannot_build(name, error) from error
    made: dict[int, nn.Parameter] = {}  # shared weights stay shared
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(zeros, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model


def cannot_build(name: str, error: Exception) -> Failure:
    """Return the Failure for a config.json from which transformers cannot build a model."""
    if isinstance(error, ImportError):
        package = str(error).strip().partition("\n")[0]
        return Failure(
            Reason.BASE_MODEL_INVALID,
            f"{name} needs a package that the trainer's image does not have: {package}",
            "Use another base model. Of a multimodal model, the checkpoint of the language model alone may need no such package.",
        )
    return Failure(
        Reason.BASE_MODEL_INVALID,
        f"cannot build {name} from its config.json: {type(error).__name__}: {error}",
        "Set spec.source of the BaseModel to the complete folder of a language model that transformers supports.",
    )


def check_adapter(folder: Path, config: dict[str, Any], base: Any, who: str, base_name: str) -> Fit:
    """Check the adapter in `folder` and return its properties, as its (reduced) config says. Raises
    Failure(AdapterInvalid) unless its tensors are finite and exactly those that the config creates on the base
    model."""
    path = folder / "adapter_model.safetensors"
    everything = [name for name, _ in base.named_modules()]
    lora = config["peft_type"] == "LORA"
    try:
        if lora:
            config = name_as_served(folder, config, base)
            check_modules(path, base, who, base_name)
            without_copies(path, base, who, base_name)
    except (SafetensorError, OSError) as error:
        raise invalid(f"{who}: {path.name} is not a complete safetensors file: {error}") from error
    fields = {key: value for key, value in config.items() if key != "peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about shared embeddings
        try:
            adapter: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**fields)
            # On the meta device, because only names and shapes are compared.
            model = get_peft_model(base, adapter, low_cpu_mem_usage=lora)
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise invalid(
                f"{who} does not fit the base model {base_name}: {error}",
                "Set spec.baseModel to the model on which the adapter was tuned.",
            ) from error
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    check_tensors(path, shapes, who, base_name)
    alpha = config.get("lora_alpha")
    return Fit(
        rank=config.get("r"),
        alpha=float(alpha) if alpha is not None else None,
        virtual_tokens=config.get("num_virtual_tokens"),
        targets=sorted({name.rpartition(".")[2] for name in getattr(model.base_model, "targeted_module_names", [])}),
        config=resolved_config(config, model, everything) if lora else config,
    )


def check_tensors(path: Path, shapes: dict[str, list[int]], who: str, base_name: str) -> None:
    """Check a safetensors file. Raises Failure(AdapterInvalid) unless it has exactly these tensors, all of finite
    floats."""
    remedy = "Set spec.baseModel to the model on which the adapter was tuned."
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if unknown := sorted(found.keys() - shapes.keys()):
                raise invalid(
                    f"{who} has {len(unknown)} tensors that do not belong to its config on {base_name}, the first is {unknown[0]}",
                    remedy,
                )
            if missing := sorted(shapes.keys() - found.keys()):
                raise invalid(
                    f"{who} lacks {len(missing)} tensors that its adapter_config.json names for {base_name}, the first is {missing[0]}",
                    "Upload the complete adapter, with the config that belongs to it.",
                )
            for name, shape in sorted(found.items()):
                if shape != shapes[name]:
                    raise invalid(
                        f"{who}: {name} has shape {shape}, but on {base_name} it must have shape {shapes[name]}", remedy
                    )
            for name in found:
                check_numbers(file, name, who)
    except (SafetensorError, OSError) as error:
        raise invalid(f"{who}: {path.name} is not a complete safetensors file: {error}") from error


def check_numbers(file: Any, name: str, who: str) -> None:
    """Check a tensor of an open safetensors file. Raises Failure(AdapterInvalid) if it holds other values than finite
    floats."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise invalid(f"{who}: {name} has type {dtype}, but weights must be F64, F32, F16 or BF16")
    if not bool(torch.isfinite(file.get_tensor(name)).all()):
        raise invalid(f"{who}: {name} holds NaN or infinity: its training diverged")
