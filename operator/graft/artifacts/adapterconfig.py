"""The rule for adapter_config.json (PURE): what Graft serves of peft's adapters.

The importer, the agent and the CPU engine apply it. So an adapter that the importer accepts is loaded later.
"""

import re
from typing import Any

MOST_RANK = 512  # the highest that vLLM knows
MOST_VIRTUAL_TOKENS = 512
# The keys that describe an adapter. All others are dropped, and never reach an engine.
_COMMON = frozenset({"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"})
LORA_KEYS = _COMMON | {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
}  # fmt: skip
PROMPT_KEYS = _COMMON | {
    "num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers",
}  # fmt: skip
# Keys that must not be dropped silently: they name code to run, or change the meaning of the weights in a way that vLLM's
# contract or the CPU engine does not support.
REFUSED = {
    "auto_map": "code in adapters",
    "use_dora": "DoRA",
    "lora_bias": "a bias in LoRA",
    "modules_to_save": "modules_to_save (whole modules beside the low-rank update)",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters (an update of stacked experts)",
    "megatron_config": "Megatron",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# Other values (pissa, olora, corda, loftq and others) start from changed weights of the base model, which are not those
# that are served.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# peft reads the keys of patterns as regular expressions. Published ones are plain names, so that no match can hang.
MODULE = re.compile(r"\^?[\w.]+")
HUB = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})@([0-9a-f]{40})", re.ASCII)


class AdapterConfigError(ValueError):
    """The config is not one of an adapter that Graft serves. The message says why, without the file's name."""


class RankTooHigh(AdapterConfigError):
    """A rank is above the limit."""


def base_reference(name: str, uri: str) -> tuple[str, str | None]:
    """Return (base_model_name_or_path, revision) for peft and transformers: the repository of an hf:// URI and its commit,
    otherwise a folder beside the reader.

    A bare name would be a repository of the Hub, which may belong to anybody. `./` says that it is a folder.
    """
    found = HUB.fullmatch(uri)
    return (found[1], found[2]) if found else (f"./{name}", None)


def check(config: dict[str, Any], most_rank: int = MOST_RANK) -> None:
    """Check the config of a LoRA or a tuned prompt.

    Raises AdapterConfigError.
    """
    for key, feature in REFUSED.items():
        if config.get(key):
            raise AdapterConfigError(f"{key} is set, but {feature} is not supported")
    match config.get("peft_type"):
        case "LORA":
            _check_lora(config, most_rank)
        case "PROMPT_TUNING":
            _check_prompt(config)
        case other:
            raise AdapterConfigError(f"peft_type is {str(other)[:40]!r}: only LORA and PROMPT_TUNING are supported")


def check_resolved(config: dict[str, Any]) -> None:
    """Check that the patterns of a published LoRA are plain names. Raises AdapterConfigError."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {}:
            if not isinstance(key, str) or MODULE.fullmatch(key) is None:
                raise AdapterConfigError(
                    f"the keys of {field} must be module names, not {str(key)[:80]!r}. Import the adapter again, which resolves them"
                )


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that describe the adapter."""
    keys = LORA_KEYS if config.get("peft_type") == "LORA" else PROMPT_KEYS
    return {key: value for key, value in config.items() if key in keys}


def highest_rank(config: dict[str, Any]) -> int:
    """Return the highest rank of a checked LoRA's modules."""
    return int(max(config["r"], *(config.get("rank_pattern") or {}).values(), 0))


def _check_lora(config: dict[str, Any], most_rank: int) -> None:
    if config.get("bias") not in (None, "none"):
        raise AdapterConfigError(
            f"Adapter bias is not supported: bias is {str(config['bias'])[:40]!r}, but only none can be served"
        )
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise AdapterConfigError(
            f"init_lora_weights is {str(start)[:40]!r}, so the adapter belongs to another base model than the one that it names. Convert it "
            "to a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise AdapterConfigError(f"{field} is not a map of module names")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise AdapterConfigError(
            f"r and rank_pattern are {ranks[:8]}, but a rank must be an integer from 1 to {MOST_RANK}"
        )
    if highest_rank(config) > MOST_RANK:
        raise RankTooHigh(f"r and rank_pattern are {ranks[:8]}, but a rank must be an integer from 1 to {MOST_RANK}")
    if highest_rank(config) > most_rank:
        raise RankTooHigh(f"rank {highest_rank(config)} is above the limit {most_rank}")
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(alpha, int | float) and type(alpha) is not bool and -1e9 < alpha < 1e9 for alpha in alphas):
        raise AdapterConfigError(f"lora_alpha and alpha_pattern are {alphas[:8]}, but they must be finite numbers")
    modules = config.get("target_modules")
    names = modules if isinstance(modules, list) else [modules]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise AdapterConfigError("target_modules names no modules")


def _check_prompt(config: dict[str, Any]) -> None:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or not 1 <= count <= MOST_VIRTUAL_TOKENS:
        raise AdapterConfigError(
            f"num_virtual_tokens is {str(count)[:40]}, but it must be an integer from 1 to {MOST_VIRTUAL_TOKENS}"
        )
