"""The gateway's flags; each may come from the environment instead."""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from graft.contracts.mounts import GATEWAY_PORT

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
MAX_BODY_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """What one gateway was started with. Times in seconds."""

    namespace: str = "default"
    listen_address: str = ""
    port: int = GATEWAY_PORT
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = 60.0  # to receive a request's body
    connect_timeout: float = 2.0
    idle_timeout: float = 300.0  # without a byte from the engine; a plain answer comes only when all of it is there
    total_timeout: float = 3600.0
    attempts: int = 3
    step_tokens: int = 512  # of a sequence's answers before the last, where the request has no limit
    avoid_seconds: float = 5.0  # a replica that could not be reached
    name: str = "gateway"  # the pod's: whose keys of graft-demand are its own
    hold_seconds: float = 120.0  # that a request waits for a deployment which sleeps
    max_held: int = 64  # such requests, by model
    stale_seconds: float = 120.0  # table age from which the log says so
    shutdown_delay: float = 5.0  # unready, still accepting: until Services have noticed
    drain_seconds: float = 60.0
    log_level: str = "INFO"


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from flags, else from the environment: --idle-timeout is GRAFT_GATEWAY_IDLE_TIMEOUT."""
    known = Settings()
    parser = argparse.ArgumentParser(
        prog="graft_server.gateway", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def flag(name: str, kind: type, text: str, default: object | None = None) -> None:
        value = getattr(known, name.replace("-", "_")) if default is None else default
        value = os.environ.get("GRAFT_GATEWAY_" + name.upper().replace("-", "_"), value)
        parser.add_argument(f"--{name}", type=kind, default=value, help=text)

    here = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None
    flag("namespace", str, "where the routes ConfigMaps are", os.environ.get("POD_NAMESPACE") or here)
    flag("listen-address", str, "address to listen on; empty: all")
    flag("port", int, "port of everything, metrics included")
    flag("max-body-bytes", int, "largest request body")
    flag("body-timeout", float, "to receive a request's body")
    flag("connect-timeout", float, "to connect to an engine")
    flag("idle-timeout", float, "longest silence of an engine")
    flag("total-timeout", float, "longest answer")
    flag("attempts", int, "replicas tried for one request")
    flag(
        "step-tokens", int, "longest answer of a sequence's steps before the last, where the request sets no max_tokens"
    )
    flag("avoid-seconds", float, "how long an unreachable replica is avoided")
    flag("name", str, "name of this gateway", os.environ.get("POD_NAME") or socket.gethostname())
    flag("hold-seconds", float, "that a request waits for a deployment which sleeps")
    flag("max-held", int, "requests that wait so, by model")
    flag("stale-seconds", float, "table age from which the log says so")
    flag("shutdown-delay", float, "between SIGTERM and the end of accepting")
    flag("drain-seconds", float, "for requests in flight at the end")
    flag("log-level", str, "DEBUG, INFO, WARNING or ERROR")
    return Settings(**vars(parser.parse_args(arguments)))
