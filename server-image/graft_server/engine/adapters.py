"""Reads an adapter's directory and refuses whatever this engine would not compute faithfully.

Everything is checked here, before peft sees any of it: the config is reduced to the keys below, the weights come from
safetensors alone, and every tensor must belong to a module of the base model and have its shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from graft_server.engine.model import ModuleShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
# A pattern's key is matched as a regular expression by peft: plain module names only, so none can run away.
PATTERN_KEY = re.compile(r"\^?[\w.]+")
# peft's features that change the result and that neither vLLM's contract nor this engine has.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in LoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "auto_map": "code in adapters (auto_map)",
}


class AdapterInvalidError(Exception):
    """The adapter cannot be served on this base model; the message says why."""


class AdapterNotFoundError(Exception):
    """No adapter's files lie at the path."""


@dataclass(frozen=True)
class AdapterWeights:
    """A checked adapter: peft's config and its tensors by peft's names, in float32 memory of their own."""

    config: LoraConfig
    tensors: Mapping[str, Any]


class _Config(BaseModel):
    """The keys of adapter_config.json that matter for inference. All others are dropped."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: FiniteFloat
    target_modules: list[str] | str
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)


def read_adapter(path: str, modules: Mapping[str, ModuleShape], max_rank: int) -> AdapterWeights:
    """Reads and checks the adapter in the directory `path`.

    Raises AdapterNotFoundError where a file is missing and AdapterInvalidError where the engine cannot serve it.
    """
    directory = Path(path)
    config = _read_config(directory, max_rank)
    _check_targets(config, modules)
    tensors = _read_tensors(directory)
    adapted = _check_tensors(tensors, config, modules)
    # The modules are those that have tensors, by full name: a pattern of the config's is never evaluated.
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(adapted),
        fan_in_fan_out=config.fan_in_fan_out,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        inference_mode=True,
    )
    return AdapterWeights(lora, tensors)


def _read_config(directory: Path, max_rank: int) -> _Config:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise AdapterNotFoundError
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw = json.loads(file.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        peft_type = raw.get("peft_type")
        if peft_type != "LORA":
            raise AdapterInvalidError(f"peft_type is {peft_type!r}: only LORA is supported")
        config = _Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterInvalidError(f"{CONFIG_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterInvalidError(f"{CONFIG_FILE} cannot be read: {error}") from error

    for key, feature in UNSUPPORTED.items():
        if raw.get(key):
            raise AdapterInvalidError(f"{feature} is not supported")
    if config.bias != "none":
        raise AdapterInvalidError(f"Adapter bias is not supported (bias is {config.bias!r})")
    rank = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    if rank > max_rank:
        raise AdapterInvalidError(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not PATTERN_KEY.fullmatch(key):
            raise AdapterInvalidError(f"rank_pattern and alpha_pattern take module names, not {key!r}")
    return config


def _check_targets(config: _Config, modules: Mapping[str, ModuleShape]) -> None:
    if isinstance(config.target_modules, str):
        return  # a pattern: the tensors say what it matched
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise AdapterInvalidError(f"target module {target!r} is not in the base model")


def _read_tensors(directory: Path) -> dict[str, Any]:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        if (directory / PICKLE_FILE).exists():
            raise AdapterInvalidError(f"{PICKLE_FILE} is a pickle and is refused: only {WEIGHTS_FILE} is loaded")
        raise AdapterNotFoundError
    try:
        with safe_open(file, framework="pt") as weights:
            # Copied: a tensor backed by the file would change with it.
            return {
                name: weights.get_tensor(name).to(torch.float32, copy=True)
                for name in weights.keys()  # noqa: SIM118  (safe_open is not a dict)
                if not name.endswith(".base_layer.weight")  # peft saves resized embeddings along; vLLM skips them too
            }
    except SafetensorError as error:
        raise AdapterInvalidError(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _check_tensors(tensors: Mapping[str, Any], config: _Config, modules: Mapping[str, ModuleShape]) -> set[str]:
    """Checks that the tensors are whole pairs of matrices for modules of the model; returns those modules' names."""
    parts: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or match is None:
            raise AdapterInvalidError(f"tensor {name!r} is not a LoRA weight")
        module, part = match["module"], match["part"]
        if module not in modules:
            raise AdapterInvalidError(f"module {module!r} is not in the base model")
        shape = modules[module]
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
        wanted = (rank, shape.inputs) if part.endswith("A") else (shape.outputs, rank)
        if ("embedding" in part) != shape.embedding or tuple(tensor.shape) != wanted:
            raise AdapterInvalidError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the base model needs {wanted}")
        parts.setdefault(module, set()).add(part)
    if not parts:
        raise AdapterInvalidError(f"{WEIGHTS_FILE} has no LoRA weights")
    for module, found in parts.items():
        if len(found) != 2:
            raise AdapterInvalidError(f"module {module!r} has only {', '.join(sorted(found))}")
    return set(parts)
