"""The gateway's command-line flags. Each can be set by an environment variable instead."""

import argparse
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graft.contracts.mounts import GATEWAY_PORT

from graft_server.connections import ConnectionLimits
from graft_server.gateway.callers import Network, networks

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
MAX_BODY_BYTES = 10 * 1024 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """The settings of one gateway. Times are in seconds."""

    namespace: str = "default"
    listen_address: str = ""
    port: int = GATEWAY_PORT
    metrics_port: int = 9090
    max_body_bytes: int = MAX_BODY_BYTES
    max_body_depth: int = 32  # of nested objects and arrays in a request
    max_body_values: int = 200_000  # in all objects and arrays of a request; a prompt of token ids has one per token
    max_answer_bytes: int = MAX_ANSWER_BYTES  # of an engine, if it does not stream
    max_answer_values: int = 1_000_000
    # Memory of requests and answers that the gateway holds at once, in bytes. With these values, a gateway under attack
    # stays below the 512 MiB of the chart. A caller is a key in the header Authorization, or else an address. An
    # address may hold more than a key, because it may be an Ingress.
    max_bytes_in_flight: int = 80 * 1024 * 1024
    max_bytes_per_peer: int = 64 * 1024 * 1024
    max_bytes_per_caller: int = 48 * 1024 * 1024
    max_connections: int = 2048
    max_connections_per_peer: int = 1024
    trusted_proxies: tuple[Network, ...] = ()  # their X-Forwarded-For names the caller
    max_head_bytes: int = 64 * 1024  # of a request's line and headers
    head_timeout: float = 10.0  # to receive a request's line and headers
    keepalive_timeout: float = 75.0  # between two requests of a connection
    send_timeout: float = 60.0  # in which the client must read at least 16 KiB of a waiting answer
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
    authentication: Literal["keys", "none"] = "keys"
    log_level: str = "INFO"

    @property
    def connections(self) -> ConnectionLimits:
        """Return the bounds on connections."""
        return ConnectionLimits(
            most=self.max_connections,
            per_peer=self.max_connections_per_peer,
            head_seconds=self.head_timeout,
            head_bytes=self.max_head_bytes,
            send_seconds=self.send_timeout,
        )


def _authentication(text: str) -> str:
    if text not in {"keys", "none"}:
        raise argparse.ArgumentTypeError("it must be keys or none")
    return text


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the settings from flags, else from the environment: --idle-timeout is GRAFT_GATEWAY_IDLE_TIMEOUT."""
    known = Settings()
    parser = argparse.ArgumentParser(
        prog="graft_server.gateway", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def flag(name: str, kind: Callable[[str], object], text: str, default: object | None = None) -> None:
        value = getattr(known, name.replace("-", "_")) if default is None else default
        value = os.environ.get("GRAFT_GATEWAY_" + name.upper().replace("-", "_"), value)
        parser.add_argument(f"--{name}", type=kind, default=value, help=text)

    here = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None
    flag("namespace", str, "namespace of the routes ConfigMaps", os.environ.get("POD_NAMESPACE") or here)
    flag("listen-address", str, "address to listen on; empty: all addresses")
    flag("port", int, "port for clients and probes")
    flag("metrics-port", int, "port for /metrics")
    flag("max-body-bytes", int, "largest request body, in bytes")
    flag("max-body-depth", int, "levels of nested objects and arrays in a request body")
    flag("max-body-values", int, "values in a request body")
    flag("max-answer-bytes", int, "largest answer of an engine that does not stream, in bytes")
    flag("max-answer-values", int, "values in such an answer")
    flag("max-bytes-in-flight", int, "bytes of requests and answers that the gateway holds at once")
    flag("max-bytes-per-peer", int, "the same for one client address, which may be a proxy")
    flag("max-bytes-per-caller", int, "the same for one key in the header Authorization")
    flag("max-connections", int, "connections of clients at once")
    flag("max-connections-per-peer", int, "connections of one client address at once")
    flag("trusted-proxies", networks, "CIDRs of proxies whose X-Forwarded-For names the caller, with commas", "")
    flag("max-head-bytes", int, "bytes of a request's line and headers")
    flag("head-timeout", float, "seconds to receive a request's line and headers")
    flag("keepalive-timeout", float, "seconds that a connection may be idle between two requests")
    flag("send-timeout", float, "seconds to wait for a client that does not read its answer")
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
    flag(
        "authentication",
        _authentication,
        "keys: clients need the key of an ApiKey. none: everybody may use every model",
    )
    flag("log-level", str, "DEBUG, INFO, WARNING or ERROR")
    return Settings(**vars(parser.parse_args(arguments)))
