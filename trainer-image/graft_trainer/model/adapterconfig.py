"""Check the adapter_config.json of an imported or composed adapter (PURE), and reduce it to the keys that describe
it."""

from typing import Any

from graft.api.recipe import MethodName
from graft.artifacts import adapterconfig
from graft.artifacts.adapterconfig import AdapterConfigError
from graft.artifacts.sources import CONFIG_LIMITS
from graft.bounded import OutOfBounds, parse_json
from graft.contracts.progress import Reason

from graft_trainer.data.tokens import Task
from graft_trainer.run.failures import Failure

# Facts about the author's machine, and about the start of a training.
DROPPED = {"base_model_name_or_path", "revision", "peft_version", "init_lora_weights"}
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
    wanted = "PROMPT_TUNING" if method == "promptTuning" else "LORA"
    kind = config.get("peft_type")
    if kind != wanted:
        raise invalid(
            f"{who}: adapter_config.json: peft_type is {str(kind)[:40]!r}, but method {method} expects {wanted}",
            "Set spec.method to match the adapter: lora or qlora for LORA, promptTuning for PROMPT_TUNING. Other types are not supported.",
        )
    try:
        adapterconfig.check(config)
    except AdapterConfigError as error:
        raise invalid(
            f"{who}: adapter_config.json: {error}",
            "Correct the config at its source, train the adapter again without what the message names, or merge the adapter into its "
            "base model yourself.",
        ) from error
    known = adapterconfig.reduced(config)
    reduced = {key: value for key, value in known.items() if key not in DROPPED and value not in (None, {}, [])}
    return reduced | {"peft_type": wanted, "task_type": TASK_TYPES[task], "inference_mode": True}


def invalid(message: str, remedy: str = "Correct the files at their source, or use other files.") -> Failure:
    """Return the Failure for an imported or composed adapter that cannot be used."""
    return Failure(Reason.ADAPTER_INVALID, message, f"{remedy} Then delete this Adapter and create it again.")
