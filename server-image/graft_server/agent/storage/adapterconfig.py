"""Check adapter_config.json and reduce it to known keys (PURE). Unknown keys never reach the engine."""

from typing import Any

from graft.artifacts.sources import CONFIG_LIMITS, TOKENIZER_LIMITS
from graft.bounded import OutOfBounds, parse_json

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

# peft's LoraConfig and PromptTuningConfig, as far as an engine needs them.
LORA_KEYS = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "peft_version",
    }
)
PROMPT_KEYS = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "num_virtual_tokens",
        "num_transformer_submodules",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "peft_version",
    }
)
# Keys that must not be dropped silently: they name code to run or change the meaning of the weights.
REFUSED = {
    "auto_map": "names code to run",
    "lora_bias": "is set, but engines do not support a bias",
    "trainable_token_indices": "is set, but engines do not support it",
    "layer_replication": "is set, but engines do not support it",
    "target_parameters": "is set, but engines do not support it",
    "use_qalora": "is set, but engines do not support it",
    "use_bdlora": "is set, but engines do not support it",
    "alora_invocation_tokens": "is set, but engines do not support it",
}


class ConfigRejected(AdapterError):
    """The config cannot be served. The message says why."""

    def __init__(self, message: str, reason: AdapterReason = AdapterReason.CONFIG_INVALID) -> None:
        super().__init__(reason, message)


def reduced_config(data: bytes, manifest_rank: int | None, max_rank: int) -> dict[str, Any]:
    """Return the known keys of the config of a LoRA or a tuned prompt.

    Raises ConfigRejected if the config is of another type, or if its rank differs from the manifest.
    """
    config = _document("adapter_config.json", data)
    for key, why in REFUSED.items():
        if config.get(key):
            raise ConfigRejected(f"adapter_config.json: {key} {why}")
    match config.get("peft_type"):
        case "LORA":
            return _lora(config, manifest_rank, max_rank)
        case "PROMPT_TUNING":
            return _prompt(config)
        case other:
            raise ConfigRejected(
                f"adapter_config.json: peft_type is {other!r}; only LORA and PROMPT_TUNING can be served"
            )


def _lora(config: dict[str, Any], manifest_rank: int | None, max_rank: int) -> dict[str, Any]:
    if config.get("use_dora"):
        raise ConfigRejected("adapter_config.json: use_dora is set, but engines do not support DoRA")
    if config.get("bias") not in (None, "none"):
        raise ConfigRejected(f"adapter_config.json: bias is {config['bias']!r}; only none can be served")

    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise ConfigRejected(f"adapter_config.json: r is {rank!r}, not a rank")
    if rank != manifest_rank:
        raise ConfigRejected(f"adapter_config.json: r is {rank}, but manifest.json says rank {manifest_rank}")
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(type(value) is int for value in pattern.values()):
        raise ConfigRejected("adapter_config.json: rank_pattern is not a map of ranks")
    if (highest := max([rank, *pattern.values()])) > max_rank:
        raise ConfigRejected(
            f"adapter_config.json: rank {highest} is above the deployment's limits.maxLoraRank {max_rank}",
            AdapterReason.RANK_TOO_HIGH,
        )

    modules = config.get("target_modules")
    names = modules if isinstance(modules, list) else [modules]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigRejected("adapter_config.json: target_modules names no modules")
    return {key: value for key, value in config.items() if key in LORA_KEYS}


def _prompt(config: dict[str, Any]) -> dict[str, Any]:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise ConfigRejected(f"adapter_config.json: num_virtual_tokens is {count!r}, not a number of tokens")
    return {key: value for key, value in config.items() if key in PROMPT_KEYS}


def check_tokenizer_config(data: bytes) -> None:
    """Raise ConfigRejected if tokenizer_config.json names code to run."""
    if _document("tokenizer_config.json", data).get("auto_map"):
        raise ConfigRejected("tokenizer_config.json: auto_map names code to run")


def _document(name: str, data: bytes) -> dict[str, Any]:
    try:
        document = parse_json(data, TOKENIZER_LIMITS if name == "tokenizer_config.json" else CONFIG_LIMITS, name)
    except OutOfBounds as error:
        raise ConfigRejected(f"{name} is not JSON that an adapter needs: {error}") from error
    if not isinstance(document, dict):
        raise ConfigRejected(f"{name} is not a JSON object")
    return document
