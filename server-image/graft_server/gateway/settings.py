"""The gateway's command-line flags. Each can be set by an environment variable instead."""

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
    """The settings of one gateway. Times are in seconds."""

    namespace: str = "default"
    listen_address: str = ""
    port: int = GATEWAY_PORT
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = 60.0  # to receive a request's body
    connect_timeout: float = 2.0
    # Longest time without a byte from the engine. A plain answer arrives only when it is complete.
    idle_timeout: float = 300.0
    total_timeout: float = 3600.0
    attempts: int = 3
    step_tokens: int = 512  # token limit of a sequence's steps before the last, if the request sets none
    avoid_seconds: float = 5.0  # for a replica that cannot be reached, or that answers 502 or 503
    name: str = "gateway"  # the pod's name; part of this gateway's keys in graft-demand
    hold_seconds: float = 120.0  # longest time that a request waits for a sleeping deployment
    max_held: int = 64  # requests that wait in this way, per model
    stale_seconds: float = 120.0  # table age beyond which the gateway logs an error
    shutdown_delay: float = 5.0  # unready but still accepting, until Services have noticed
    drain_seconds: float = 60.0  # for the requests in flight
    log_level: str = "INFO"


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the settings from flags, else from the environment: --idle-timeout is GRAFT_GATEWAY_IDLE_TIMEOUT."""
    known = Settings()
    parser = argparse.ArgumentParser(
        prog="graft_server.gateway", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def flag(name: str, kind: type, text: str, default: object | None = None) -> None:
        value = getattr(known, name.replace("-", "_")) if default is None else default
        value = os.environ.get("GRAFT_GATEWAY_" + name.upper().replace("-", "_"), value)
        parser.add_argument(f"--{name}", type=kind, default=value, help=text)

    here = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None
    flag("namespace", str, "namespace of the routes ConfigMaps", os.environ.get("POD_NAMESPACE") or here)
    flag("listen-address", str, "address to listen on; empty: all addresses")
    flag("port", int, "port for all routes, including /metrics")
    flag("max-body-bytes", int, "largest request body, in bytes")
    flag("body-timeout", float, "seconds to receive a request's body")
    flag("connect-timeout", float, "seconds to connect to an engine")
    flag("idle-timeout", float, "longest time without a byte from the engine, in seconds")
    flag("total-timeout", float, "longest time for an answer, in seconds")
    flag("attempts", int, "attempts for one request")
    flag("step-tokens", int, "token limit of a sequence's steps before the last, if the request sets no max_tokens")
    flag("avoid-seconds", float, "seconds to avoid a replica that cannot be reached, or that answers 502 or 503")
    flag("name", str, "name of this gateway", os.environ.get("POD_NAME") or socket.gethostname())
    flag("hold-seconds", float, "longest time that a request waits for a sleeping deployment")
    flag("max-held", int, "requests that may wait for a sleeping deployment, per model")
    flag("stale-seconds", float, "age of the routing table beyond which the gateway logs an error")
    flag("shutdown-delay", float, "seconds after SIGTERM in which the gateway still accepts requests")
    flag("drain-seconds", float, "seconds that requests in flight get to finish at shutdown")
    flag("log-level", str, "DEBUG, INFO, WARNING or ERROR")
    return Settings(**vars(parser.parse_args(arguments)))
