"""The reader of adapter directories. It refuses an adapter that this engine would compute incorrectly.

An adapter is a LoRA or a tuned prompt, as peft saves them. Only the config keys below are used. Weights are read from
safetensors only. Every tensor must belong to a module of the base model and have the shape that the module needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any, TypeVar

import torch
from graft.artifacts.adapterconfig import AdapterConfigError, check, check_resolved, highest_rank
from graft.artifacts.modulenames import Renaming
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from graft_server.engine.lora import LoraWeights, Pair
from graft_server.engine.model import ModuleShape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PROMPT_TENSOR = "prompt_embeddings"
MODEL_CONFIG_FILE = "config.json"
MODEL_WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
MAX_CONFIG_BYTES = 1 << 20
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")


class AdapterInvalidError(Exception):
    """The adapter cannot be served on this base model. The message says why."""


class AdapterNotFoundError(Exception):
    """The path has no adapter files."""


class WholeModelError(AdapterInvalidError):
    """The directory holds a whole model (fine-tuned or merged), not an adapter."""


@dataclass(frozen=True)
class PromptWeights:
    """A tuned prompt (Lester et al., arXiv:2104.08691). `embeddings` [virtual tokens, hidden] precede the prompt's."""

    embeddings: Any


AdapterWeights = LoraWeights | PromptWeights


@dataclass(frozen=True)
class Limits:
    """The limits for an adapter: the base model's modules, its hidden size, the highest rank, the context length."""

    modules: Mapping[str, ModuleShape]
    hidden_size: int
    max_rank: int
    max_virtual_tokens: int
    names: Renaming = field(default_factory=Renaming)  # how adapters call the modules


V = TypeVar("V")


def _by_pattern(patterns: Mapping[str, V], module: str, default: V) -> V:
    """Return the value of the first key that matches the end of a module's name, as in peft (get_pattern_key)."""
    found = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(found, default)


class _LoraConfig(BaseModel):
    """The keys of a LoRA's adapter_config.json that inference needs. All others are dropped."""

    model_config = ConfigDict(extra="ignore")

    r: int = Field(ge=1)
    lora_alpha: FiniteFloat
    target_modules: list[str] | str
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, FiniteFloat] = Field(default_factory=dict)

    def renamed(self, names: Renaming) -> _LoraConfig:
        """Return the config with the names that the modules have in the network."""
        targets = self.target_modules
        new: dict[str, Any] = {
            "target_modules": targets if isinstance(targets, str) else [names.inward(name) for name in targets],
            "rank_pattern": {names.inward(name): value for name, value in self.rank_pattern.items()},
            "alpha_pattern": {names.inward(name): value for name, value in self.alpha_pattern.items()},
        }
        return self.model_copy(update=new)

    def rank(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor by which peft scales a module's product (rank-stabilised: arXiv:2312.03732)."""
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return float(alpha / (rank**0.5 if self.use_rslora else rank))


class _PromptConfig(BaseModel):
    """The keys of a tuned prompt's adapter_config.json."""

    model_config = ConfigDict(extra="ignore")

    num_virtual_tokens: int = Field(ge=1)
    num_transformer_submodules: int | None = None


C = TypeVar("C", bound=BaseModel)


def read_adapter(path: str, limits: Limits) -> AdapterWeights:
    """Read and check the adapter in the directory `path`.

    Raises AdapterNotFoundError if a file is missing, and AdapterInvalidError if the engine cannot serve the adapter.
    """
    directory = Path(path)
    try:
        raw = _read_config(directory)
    except OSError as error:
        if error.errno == ENAMETOOLONG:
            raise AdapterNotFoundError(f"No adapter found for {path[:200]}…") from error
        raise
    try:
        check(raw)
        check_resolved(raw)
    except AdapterConfigError as error:
        raise AdapterInvalidError(f"{CONFIG_FILE}: {error}") from error
    if raw["peft_type"] == "PROMPT_TUNING":
        return _prompt(_valid(_PromptConfig, raw), _read_tensors(directory), limits)
    config = _lora_config(raw, limits.max_rank).renamed(limits.names)
    _check_targets(config, limits.modules)
    tensors = {_renamed(name, limits.names): tensor for name, tensor in _read_tensors(directory).items()}
    _check_tensors(tensors, config, limits.modules)
    return LoraWeights(_pairs(tensors, config))


def _renamed(tensor: str, names: Renaming) -> str:
    if not tensor.startswith(PREFIX):
        return tensor
    return PREFIX + names.inward(tensor.removeprefix(PREFIX))


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not file.is_file():
        if (directory / MODEL_CONFIG_FILE).is_file() and any(
            (directory / name).is_file() for name in MODEL_WEIGHTS_FILES
        ):
            raise WholeModelError(
                f"{directory} holds a whole model (method full, or merged), not an adapter. "
                f"Serve it with a separate engine: --model {directory}"
            )
        raise AdapterNotFoundError(f"No adapter found for {directory}")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterInvalidError(f"{CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterInvalidError(f"{CONFIG_FILE} cannot be read: not a JSON object")
    return raw


def _valid(kind: type[C], raw: dict[str, Any]) -> C:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterInvalidError(f"{CONFIG_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _lora_config(raw: dict[str, Any], max_rank: int) -> _LoraConfig:
    if (highest := highest_rank(raw)) > max_rank:
        raise AdapterInvalidError(f"LoRA rank {highest} is greater than max_lora_rank {max_rank}.")
    return _valid(_LoraConfig, raw)


def _prompt(config: _PromptConfig, tensors: Mapping[str, Any], limits: Limits) -> PromptWeights:
    count = config.num_virtual_tokens
    if count >= limits.max_virtual_tokens:
        raise AdapterInvalidError(
            f"{count} virtual tokens leave no room for a prompt in the context of {limits.max_virtual_tokens} tokens"
        )
    if set(tensors) != {PROMPT_TENSOR}:
        raise AdapterInvalidError(
            f"{WEIGHTS_FILE} must hold only the tensor {PROMPT_TENSOR!r}, not {sorted(tensors)[:3]}"
        )
    # An encoder-decoder's tensor has a second half. peft neither trains nor reads it, for either stack.
    wanted = (count * (config.num_transformer_submodules or 1), limits.hidden_size)
    found = tuple(tensors[PROMPT_TENSOR].shape)
    if found != wanted:
        raise AdapterInvalidError(f"tensor {PROMPT_TENSOR!r} has shape {found}, the base model needs {wanted}")
    return PromptWeights(tensors[PROMPT_TENSOR][:count].clone())


def _check_targets(config: _LoraConfig, modules: Mapping[str, ModuleShape]) -> None:
    if isinstance(config.target_modules, str):
        return  # a pattern: the modules of the tensors are checked instead
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise AdapterInvalidError(f"target module {target!r} is not in the base model")


def _read_tensors(directory: Path) -> dict[str, Any]:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        if (directory / PICKLE_FILE).exists():
            raise AdapterInvalidError(f"{PICKLE_FILE} is a pickle and is refused: only {WEIGHTS_FILE} is loaded")
        raise AdapterNotFoundError(f"No adapter found for {directory}")
    try:
        with safe_open(file, framework="pt") as weights:
            # Copied, because a tensor that is backed by the file changes with the file.
            return {
                name: weights.get_tensor(name).to(torch.float32, copy=True)
                for name in weights.keys()  # noqa: SIM118  (safe_open is not a dict)
                if not name.endswith(".base_layer.weight")  # peft also saves resized embeddings; vLLM skips them too
            }
    except SafetensorError as error:
        raise AdapterInvalidError(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _check_tensors(tensors: Mapping[str, Any], config: _LoraConfig, modules: Mapping[str, ModuleShape]) -> None:
    """Check that the tensors form complete pairs of matrices for modules of the base model."""
    parts: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or match is None:
            raise AdapterInvalidError(f"tensor {name!r} is not a LoRA weight")
        module, part = match["module"], match["part"]
        if module not in modules:
            raise AdapterInvalidError(f"module {module!r} is not in the base model")
        shape = modules[module]
        rank = config.rank(module)
        wanted = (rank, shape.inputs) if part.endswith("A") else (shape.outputs, rank)
        if ("embedding" in part) != shape.embedding or tuple(tensor.shape) != wanted:
            raise AdapterInvalidError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the base model needs {wanted}")
        parts.setdefault(module, set()).add(part)
    if not parts:
        raise AdapterInvalidError(f"{WEIGHTS_FILE} has no LoRA weights")
    for module, found in parts.items():
        if len(found) != 2:
            raise AdapterInvalidError(f"module {module!r} has only {', '.join(sorted(found))}, not both matrices")


def _pairs(tensors: Mapping[str, Any], config: _LoraConfig) -> dict[str, Pair]:
    """Return the matrices by module, scaled in place. The modules are those that have tensors: a pattern in
    `target_modules` is never evaluated."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if match := TENSOR.fullmatch(name.removeprefix(PREFIX)):
            found.setdefault(match["module"], {})[match["part"][-1]] = tensor
    return {module: Pair(parts["A"], parts["B"].mul_(config.scale(module))) for module, parts in found.items()}
