"""Resolve the config and the names of an adapter that was tuned elsewhere against the module tree of its base model.

peft's configs may name modules by regular expressions, patterns and numbers of layers. A published version has plain lists
instead, which mean the same to every engine.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graft.artifacts.modulenames import Renaming, shortest_names
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from graft_trainer.model.adapterconfig import invalid
from graft_trainer.model.adapterfiles import PREFIX, rename_modules
from graft_trainer.model.wrappers import language_model

PARTS = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")
COPY = ".base_layer.weight"  # of embeddings beside their update: peft saves it, peft and vLLM ignore an equal one
UNRESOLVED = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
ON_ITS_BASE = "Set spec.baseModel to the model on which the adapter was tuned."


def name_as_served(folder: Path, config: dict[str, Any], base: Any) -> dict[str, Any]:
    """Rename the modules of an adapter of a multimodal model to the names that they have in `base`. Return the config.

    Older versions of transformers called the language model otherwise, and adapters may be tuned on it alone.
    """
    if not (part := language_model(base)):
        return config
    known, found = {name for name, _ in base.named_modules()}, modules_of(folder / "adapter_model.safetensors")
    candidates = [Renaming(old, part) for old in ("language_model.model", "model", "")]
    if not found or found <= known or not (fitting := [one for one in candidates if _all(one, found, known)]):
        return config
    new = fitting[0].outward
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    config = {key: value for key, value in config.items() if key not in UNRESOLVED} | {
        "target_modules": sorted(map(new, found)),
        "rank_pattern": {new(name): _by_pattern(ranks, name, config["r"]) for name in sorted(found)},
        "alpha_pattern": {new(name): _by_pattern(alphas, name, config["lora_alpha"]) for name in sorted(found)},
    }
    rename_modules(folder, new, ())
    return config


def resolved_config(config: dict[str, Any], model: Any, everything: Collection[str]) -> dict[str, Any]:
    """Return the config of a LoRA with plain lists. `model` is the base model with the update, and `everything` are the names
    of the base model's modules."""
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: module.r["default"] for name, module in layers.items()}
    alphas = {name: module.lora_alpha["default"] for name, module in layers.items()}
    patterns = {
        "rank_pattern": _pattern(ranks, config["r"]),
        "alpha_pattern": _pattern(alphas, config["lora_alpha"]),
    }
    plain = {key: value for key, value in config.items() if key not in UNRESOLVED}
    plain["target_modules"] = shortest_names(layers, everything)
    return plain | {key: value for key, value in patterns.items() if value}


def check_modules(path: Path, base: Any, who: str, base_name: str) -> None:
    """Check the modules to which the tensors of a LoRA belong. Raises Failure(AdapterInvalid) if the base model lacks one."""
    known = {name for name, _ in base.named_modules()}
    if unknown := sorted(modules_of(path) - known):
        leaves = sorted({name.rpartition(".")[2] for name in unknown})
        raise invalid(
            f"{who} updates {len(unknown)} modules that {base_name} does not have ({', '.join(leaves[:5])}), the first is {unknown[0]}",
            ON_ITS_BASE,
        )


def without_copies(path: Path, base: Any, who: str, base_name: str) -> None:
    """Remove the copies of the base model's embeddings and head from the file. save_pretrained writes them if these have an
    update. vLLM ignores them, too.

    Raises Failure(AdapterInvalid) if the file has whole embeddings of another size, or whole modules without an update.
    """
    modules, copies = dict(base.named_modules()), set()
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            module = name.removeprefix(PREFIX)
            if any(part in module for part in PARTS) or not module.endswith(".weight"):
                continue
            owner = module.removesuffix(COPY).removesuffix(".weight")
            if (weight := getattr(modules.get(owner), "weight", None)) is None:
                continue  # check_tensors() names it
            shape = list(file.get_slice(name).get_shape())
            if shape != list(weight.shape):
                raise invalid(
                    f"{who} has whole {owner} of shape {shape}, but on {base_name} it has shape {list(weight.shape)}: the vocabulary "
                    "was resized before the adapter was tuned, so that it belongs to a base model with that vocabulary",
                    "Save the base model with the resized vocabulary, create a BaseModel for it, and set spec.baseModel to it.",
                )
            if not module.endswith(COPY):
                raise invalid(
                    f"{who} has the whole weights of {owner} beside its low-rank update, and engines do not load them",
                    "If they were not tuned, save the adapter again with save_pretrained(save_embedding_layers=False). Else merge the "
                    "adapter into its base model and import it with method full.",
                )
            copies.add(name)
        if not copies:
            return
        rest, about = {name: file.get_tensor(name) for name in names if name not in copies}, file.metadata()
    part = path.with_suffix(".part")
    save_file(rest, part, about)
    part.replace(path)


def modules_of(path: Path) -> set[str]:
    """Return the names of the modules that a LoRA's file updates."""
    with safe_open(path, framework="pt") as file:
        names = [name.removeprefix(PREFIX) for name in file.keys()]  # noqa: SIM118 - safe_open is not a dict
    return {name.partition(part)[0] for name in names for part in PARTS if part in name}


def _all(one: Renaming, found: set[str], known: set[str]) -> bool:
    return {one.outward(name) for name in found} <= known


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the pattern for values that differ from the default, by the last part of the names where that is enough."""
    by_leaf: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        if value != default:
            found[leaf if len(by_leaf[leaf]) == 1 else name] = value
    return found
