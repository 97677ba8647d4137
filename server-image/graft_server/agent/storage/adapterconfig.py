"""Check the configs of a version before an engine gets its files (PURE). Unknown keys never reach the engine."""

from typing import Any

from graft.artifacts import adapterconfig
from graft.artifacts.adapterconfig import AdapterConfigError, RankTooHigh
from graft.artifacts.sources import CONFIG_LIMITS
from graft.bounded import OutOfBounds, parse_json

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason


class ConfigRejected(AdapterError):
    """The config cannot be served. The message says why."""

    def __init__(self, message: str, reason: AdapterReason = AdapterReason.CONFIG_INVALID) -> None:
        super().__init__(reason, message)


def reduced_config(data: bytes, manifest_rank: int | None, max_rank: int) -> dict[str, Any]:
    """Return the known keys of the config of a LoRA or a tuned prompt.

    Raises ConfigRejected if the config is of another type, or if its rank differs from the manifest.
    """
    config = _document("adapter_config.json", data)
    try:
        adapterconfig.check(config, max_rank)
        adapterconfig.check_resolved(config)
    except RankTooHigh as error:
        text = f"adapter_config.json: {error} (the deployment's limits.maxLoraRank)"
        raise ConfigRejected(text, AdapterReason.RANK_TOO_HIGH) from error
    except AdapterConfigError as error:
        raise ConfigRejected(f"adapter_config.json: {error}") from error
    if config["peft_type"] == "LORA" and config["r"] != manifest_rank:
        raise ConfigRejected(f"adapter_config.json: r is {config['r']}, but manifest.json says rank {manifest_rank}")
    return adapterconfig.reduced(config)


def _document(name: str, data: bytes) -> dict[str, Any]:
    try:
        document = parse_json(data, CONFIG_LIMITS, name)
    except OutOfBounds as error:
        raise ConfigRejected(f"{name} is not JSON that an adapter needs: {error}") from error
    if not isinstance(document, dict):
        raise ConfigRejected(f"{name} is not a JSON object")
    return document
