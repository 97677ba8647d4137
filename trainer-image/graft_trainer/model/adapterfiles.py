"""Rename the modules of a saved adapter: its tensors, and the names in its config."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "base_model.model."  # before the module's name in each tensor's name


def rename_modules(folder: Path, rename: Callable[[str], str], targets: Iterable[str] | None = None) -> None:
    """Rename the modules of the LoRA in `folder`. `targets` are the new target_modules; those of the config are renamed if
    it is None."""
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with safe_open(path, framework="pt") as file:
        tensors = {
            PREFIX + rename(name.removeprefix(PREFIX)): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - safe_open is not a dict
        }
        about = file.metadata()
    part = path.with_suffix(".part")
    save_file(tensors, part, about)
    part.replace(path)
    config = json.loads(config_path.read_text())
    old = config.get("target_modules")
    config["target_modules"] = sorted(targets) if targets is not None else old
    if targets is None and isinstance(old, list):
        config["target_modules"] = sorted(rename(name) for name in old)
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := config.get(key), dict):
            config[key] = {rename(name): value for name, value in pattern.items()}
    config_path.write_text(json.dumps(config))
