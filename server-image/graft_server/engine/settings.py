"""The engine's command line. A flag that vLLM has too keeps vLLM's name and default."""

from __future__ import annotations

import argparse
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graft.toolcalls import PARSERS

from graft_server.connections import ConnectionLimits

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
TRUE_WORDS = ("1", "true")


@dataclass(frozen=True)
class Settings:
    """The settings of one engine process.

    `callers` is the file of graft_server.callers. Without it, every caller may use every route, except those of `/v1` if
    there are `api_keys`.

    `max_loras` limits the different adapters in one batch, and `max_cpu_loras` the adapters in memory. If more than
    `max_waiting_requests` sequences would queue, a request gets 503. It also gets 503 if it has waited `queue_timeout`
    seconds, and 504 if its answer is not complete after `request_timeout` seconds. `max_bytes_in_flight` covers the bodies
    that are being received or answered.
    """

    model: str
    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    quantization: str | None = None
    max_loras: int = 1
    max_cpu_loras: int = 1
    max_lora_rank: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_waiting_requests: int = 64
    queue_timeout: float = 60.0
    request_timeout: float = 1800.0
    generation_config: str = "auto"
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    api_keys: tuple[str, ...] = ()
    callers: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    shutdown_timeout: float = 600.0
    runtime_loading: bool = False
    max_body_bytes: int = 16 << 20
    max_body_values: int = 200_000
    max_bytes_in_flight: int = 64 << 20
    max_connections: int = 1024
    max_head_bytes: int = 64 << 10
    head_timeout: float = 10.0
    body_timeout: float = 60.0
    keepalive_timeout: float = 75.0
    send_timeout: float = 60.0

    @property
    def tls(self) -> ssl.SSLContext | None:
        """Return how to encrypt connections, or None. Raises OSError if a file is not readable or invalid."""
        if self.ssl_certfile is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        return context

    @property
    def connections(self) -> ConnectionLimits:
        """Return the bounds on connections. The peers of an engine are few gateways, so one may have all of them."""
        return ConnectionLimits(
            most=self.max_connections,
            per_peer=self.max_connections,
            head_seconds=self.head_timeout,
            head_bytes=self.max_head_bytes,
            send_seconds=self.send_timeout,
        )


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the command line and the environment.

    If a flag is invalid, the process exits with argparse's status 2 and a message.
    """
    parser = argparse.ArgumentParser(prog="graft_server.engine", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="directory of the base model (safetensors)")
    add("--served-model-name", nargs="+", help="names for clients; the metrics show the first one (default: --model)")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto means float32")
    add("--quantization", default=None, choices=["bitsandbytes"], help="hold the base model in 4 bits (nf4)")
    add("--enable-lora", action="store_true", help="accepted for compatibility with vLLM; LoRA is always on")
    add("--max-loras", type=_positive, default=1, help="different adapters in one batch")
    add("--max-cpu-loras", type=_positive, default=None, help="adapters held in memory (default: --max-loras)")
    add("--max-lora-rank", type=int, default=16, choices=LORA_RANKS)
    add("--max-model-len", type=_positive, default=None, help="context in tokens (default: from the model's config)")
    add("--max-num-seqs", type=_positive, default=16, help="sequences in one batch")
    add("--max-waiting-requests", type=_positive, default=64, help="sequences that may queue; further requests get 503")
    add("--queue-timeout", type=_seconds, default=60.0, help="seconds in the queue after which a request gets 503")
    add("--request-timeout", type=_seconds, default=1800.0, help="seconds without a whole answer before a 504")
    add("--generation-config", default="auto", choices=["auto", "vllm"], help="auto: sampling defaults of the model")
    add("--chat-template", default=None, help="a file with a Jinja template, or the template itself")
    add("--trust-request-chat-template", action="store_true", help="use the chat_template of a request")
    add("--enable-auto-tool-choice", action="store_true", help="return calls of tools; needs --tool-call-parser")
    add("--tool-call-parser", default=None, choices=list(PARSERS), help="the format in which the model calls tools")
    add("--api-key", nargs="+", default=None, help="API keys that /v1 accepts (default: VLLM_API_KEY)")
    add("--callers", default=None, help="file with the SHA-256 of the keys of agent and gateways; see docs/security.md")
    add("--ssl-certfile", default=None, help="certificate (PEM); with it, the engine listens with TLS only")
    add("--ssl-keyfile", default=None, help="its private key (PEM)")
    add("--shutdown-timeout", type=float, default=600.0, help="seconds for running requests to finish after SIGTERM")
    known = Settings("", ())
    add("--max-body-bytes", type=_positive, default=known.max_body_bytes, help="largest request body, in bytes")
    add("--max-body-values", type=_positive, default=known.max_body_values, help="values in the JSON of a request")
    add("--max-bytes-in-flight", type=_positive, default=known.max_bytes_in_flight, help="bytes of all bodies at once")
    add("--max-connections", type=_positive, default=known.max_connections, help="connections at once")
    add("--max-head-bytes", type=_positive, default=known.max_head_bytes, help="bytes of a request's headers")
    add("--head-timeout", type=_seconds, default=known.head_timeout, help="seconds to receive a request's headers")
    add("--body-timeout", type=_seconds, default=known.body_timeout, help="seconds to receive a request's body")
    add("--keepalive-timeout", type=_seconds, default=known.keepalive_timeout, help="seconds between two requests")
    add(
        "--send-timeout",
        type=_seconds,
        default=known.send_timeout,
        help="seconds to wait for a client that reads nothing",
    )
    flags = parser.parse_args(arguments)

    max_cpu_loras = flags.max_cpu_loras or flags.max_loras
    if max_cpu_loras < flags.max_loras:
        parser.error(f"--max-cpu-loras ({max_cpu_loras}) must be at least --max-loras ({flags.max_loras})")
    if flags.enable_auto_tool_choice and flags.tool_call_parser is None:
        parser.error("--enable-auto-tool-choice requires --tool-call-parser")
    if (flags.ssl_certfile is None) != (flags.ssl_keyfile is None):
        parser.error("--ssl-certfile and --ssl-keyfile belong together")
    key = environment.get("VLLM_API_KEY")
    return Settings(
        model=flags.model,
        served_model_names=tuple(flags.served_model_name or [flags.model]),
        host=flags.host,
        port=flags.port,
        dtype=flags.dtype,
        quantization=flags.quantization,
        max_loras=flags.max_loras,
        max_cpu_loras=max_cpu_loras,
        max_lora_rank=flags.max_lora_rank,
        max_model_len=flags.max_model_len,
        max_num_seqs=flags.max_num_seqs,
        max_waiting_requests=flags.max_waiting_requests,
        queue_timeout=flags.queue_timeout,
        request_timeout=flags.request_timeout,
        generation_config=flags.generation_config,
        chat_template=flags.chat_template,
        trust_request_chat_template=flags.trust_request_chat_template,
        tool_call_parser=flags.tool_call_parser if flags.enable_auto_tool_choice else None,
        api_keys=tuple(flags.api_key or ([key] if key else [])),
        callers=flags.callers,
        ssl_certfile=flags.ssl_certfile,
        ssl_keyfile=flags.ssl_keyfile,
        shutdown_timeout=flags.shutdown_timeout,
        runtime_loading=environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").strip().lower() in TRUE_WORDS,
        max_body_bytes=flags.max_body_bytes,
        max_body_values=flags.max_body_values,
        max_bytes_in_flight=flags.max_bytes_in_flight,
        max_connections=flags.max_connections,
        max_head_bytes=flags.max_head_bytes,
        head_timeout=flags.head_timeout,
        body_timeout=flags.body_timeout,
        keepalive_timeout=flags.keepalive_timeout,
        send_timeout=flags.send_timeout,
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} must be greater than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
