"""The agent's flags. Each flag can be set in the environment instead. No flag contains a secret."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from graft.contracts.mounts import ADAPTERS_DIR, AGENT_PORT, ENGINE_PORT, STORAGE_DIR

from graft_server.agent.engine.client import LOAD_SECONDS
from graft_server.agent.storage.objects import STALL_SECONDS

MAX_ADAPTER_BYTES = 16 << 30


@dataclass(frozen=True)
class Settings:
    """The settings of one agent."""

    namespace: str
    wanted_configmap: str
    residency_configmap: str
    pod_name: str
    pod_uid: str
    engine_url: str
    engine_dir: Path | None
    adapters_dir: Path
    storage_dir: Path
    listen_address: str | None
    port: int
    base_model_name: str | None
    trusted_keys: tuple[str, str] | None  # namespace, ConfigMap
    cache_bytes: int | None
    max_adapter_bytes: int
    stall_seconds: float
    load_timeout_seconds: float
    log_level: str


def parse(arguments: list[str]) -> Settings:
    """Parse the flags. The default of a flag comes from the environment: ENGINE_URL for --engine-url."""
    parser = argparse.ArgumentParser(prog="graft_server.agent", description=__doc__)

    def flag(name: str, default: str | None, text: str) -> None:
        value = os.environ.get(name.upper().replace("-", "_"), default)
        parser.add_argument(f"--{name}", default=value, required=value is None, help=text)

    flag("namespace", os.environ.get("POD_NAMESPACE"), "the pod's namespace")
    flag("wanted-configmap", None, "ConfigMap with the wanted adapters")
    flag("residency-configmap", None, "ConfigMap to which the agent writes the state of the adapters, one key per pod")
    flag("pod-name", None, "name of the pod, from the downward API")
    flag("pod-uid", None, "UID of the pod, from the downward API")
    flag("engine-url", f"http://127.0.0.1:{ENGINE_PORT}", "URL of the pod's engine")
    flag(
        "engine-dir",
        "",
        "folder in which the engine reads who may call it, and its certificate; empty: the engine answers everybody",
    )
    flag("adapters-dir", ADAPTERS_DIR, "folder shared with the engine, which mounts it at the same path")
    flag("storage-dir", STORAGE_DIR, "the mounted storage Secret")
    flag("listen-address", "", "address to listen on; empty: all addresses")
    flag("port", str(AGENT_PORT), "port of /readyz, /livez and /metrics")
    flag(
        "trusted-keys",
        "",
        "NAMESPACE/NAME of the ConfigMap with the public keys; empty: signatures are not checked",
    )
    flag("base-model-name", "", "model that the engine must list before the pod is ready; empty: not checked")
    flag(
        "cache-bytes",
        "",
        "bytes, limit of the adapters' files, including kept older versions; empty: limited by the disk only",
    )
    flag("max-adapter-bytes", str(MAX_ADAPTER_BYTES), "bytes, a larger version is refused")
    flag(
        "stall-seconds",
        str(STALL_SECONDS),
        "seconds without a byte, after which the agent closes a transfer and resumes it",
    )
    flag("load-timeout-seconds", str(LOAD_SECONDS), "seconds that the engine has to load an adapter")
    flag("log-level", "INFO", "DEBUG, INFO, WARNING or ERROR")
    values = vars(parser.parse_args(arguments))
    keys_namespace, _, keys_name = values["trusted_keys"].partition("/")
    if values["trusted_keys"] and not (keys_namespace and keys_name):
        parser.error(f"--trusted-keys: {values['trusted_keys']} is not of the form NAMESPACE/NAME")
    return Settings(
        **{
            **values,
            "adapters_dir": Path(values["adapters_dir"]),
            "engine_dir": Path(values["engine_dir"]) if values["engine_dir"] else None,
            "storage_dir": Path(values["storage_dir"]),
            "listen_address": values["listen_address"] or None,
            "port": int(values["port"]),
            "trusted_keys": (keys_namespace, keys_name) if keys_name else None,
            "base_model_name": values["base_model_name"] or None,
            "cache_bytes": int(values["cache_bytes"]) if values["cache_bytes"] else None,
            "max_adapter_bytes": int(values["max_adapter_bytes"]),
            "stall_seconds": float(values["stall_seconds"]),
            "load_timeout_seconds": float(values["load_timeout_seconds"]),
        }
    )
