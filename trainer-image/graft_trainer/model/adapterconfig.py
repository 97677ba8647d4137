"""Check the adapter_config.json of an imported or composed adapter (PURE), and reduce it to the keys that describe
it."""

from typing import Any

from graft.api.recipe import MethodName
from graft.artifacts.sources import CONFIG_LIMITS
from graft.bounded import OutOfBounds, parse_json
from graft.contracts.progress import Reason

from graft_trainer.data.tokens import Task
from graft_trainer.run.failures import Failure

LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "bias", "use_rslora", "layers_to_transform", "layers_pattern",
)  # fmt: skip
PROMPT_KEYS = (
    "num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers",
)  # fmt: skip
# These keys must not be dropped silently: they name code to run, or change the weights' meaning in a way that engines
# do not support.
REFUSED = {
    "auto_map": "names code to run",
    "use_dora": "is set, but Graft does not serve DoRA",
    "modules_to_save": "is set, but Graft does not serve whole modules beside the low-rank update",
    "lora_bias": "is set, but engines do not support a bias",
    "trainable_token_indices": "is set, but engines do not support it",
    "layer_replication": "is set, but engines do not support it",
    "megatron_config": "is set, but engines do not support it",
    "target_parameters": "is set, but engines do not support it",
    "use_qalora": "is set, but engines do not support it",
    "use_bdlora": "is set, but engines do not support it",
    "alora_invocation_tokens": "is set, but engines do not support it",
    "arrow_config": "is set, but engines do not support it",
}
# Other values (pissa, olora, corda, loftq, …) start from changed weights of the base model, which are not those that
# are served.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def reduced_config(data: bytes, who: str, method: MethodName, task: Task) -> dict[str, Any]:
    """Return the keys that describe the adapter. Raises Failure(AdapterInvalid) if the adapter is not of the method, or
    if Graft does not serve such an adapter."""
    try:
        config = parse_json(data, CONFIG_LIMITS, "it")
    except OutOfBounds as error:
        raise invalid(f"{who}: adapter_config.json is not JSON of an adapter: {error}") from error
    if not isinstance(config, dict):
        raise invalid(f"{who}: adapter_config.json is not a JSON object")
    for key, why in REFUSED.items():
        if config.get(key):
            raise invalid(
                f"{who}: adapter_config.json: {key} {why}",
                "Train the adapter again without it, or merge the adapter into its base model yourself.",
            )
    wanted = "PROMPT_TUNING" if method == "promptTuning" else "LORA"
    kind = config.get("peft_type")
    if kind != wanted:
        raise invalid(
            f"{who}: adapter_config.json: peft_type is {kind!r}, but method {method} expects {wanted}",
            "Set spec.method to match the adapter: lora or qlora for LORA, promptTuning for PROMPT_TUNING. Other types are not supported.",
        )
    _check_lora(config, who) if wanted == "LORA" else _check_prompt(config, who)
    keys = LORA_KEYS if wanted == "LORA" else PROMPT_KEYS
    reduced = {key: config[key] for key in keys if config.get(key) not in (None, {}, [])}
    return reduced | {"peft_type": wanted, "task_type": TASK_TYPES[task], "inference_mode": True}


def _check_lora(config: dict[str, Any], who: str) -> None:
    if config.get("bias") not in (None, "none"):
        raise invalid(f"{who}: adapter_config.json: bias is {config['bias']!r}, but Graft serves only none")
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise invalid(
            f"{who}: adapter_config.json: init_lora_weights is {start!r}, so the adapter belongs to another base model than the one that it names",
            "Convert the adapter to a plain LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion).",
        )
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(type(rank) is int and 1 <= rank <= 512 for rank in ranks):
        raise invalid(
            f"{who}: adapter_config.json: r and rank_pattern are {ranks}, but a rank must be an integer from 1 to 512"
        )
    modules = config.get("target_modules")
    names = modules if isinstance(modules, list) else [modules]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise invalid(f"{who}: adapter_config.json: target_modules names no modules")


def _check_prompt(config: dict[str, Any], who: str) -> None:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or not 1 <= count <= 512:
        raise invalid(
            f"{who}: adapter_config.json: num_virtual_tokens is {count!r}, but it must be an integer from 1 to 512"
        )


def invalid(message: str, remedy: str = "Correct the files at their source, or use other files.") -> Failure:
    """Return the Failure for an imported or composed adapter that cannot be used."""
    return Failure(Reason.ADAPTER_INVALID, message, f"{remedy} Then delete this Adapter and create it again.")
