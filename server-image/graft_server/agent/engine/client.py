"""A client for the engine's HTTP API (docs: vLLM's runtime LoRA loading): health, models, load, unload and metrics."""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5, sock_connect=2)
LOAD_SECONDS = 300.0  # the first load compiles kernels
INFO = "vllm:lora_requests_info"
ACTIVE = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class EngineDown(Exception):
    """The engine gave no usable answer.

    `gone`: nothing listens on the port, so a later answer comes from a new process.
    """

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class EngineSlow(Exception):
    """The engine did not answer a load or unload in time. It may have done it, or may still do it."""


class EngineRefused(Exception):
    """The engine refused a load or unload."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_message(status: int, body: bytes) -> str:
    """Return the message of an engine's error: from the nested or the older flat JSON form, or the first 500 bytes."""
    text = body[:500].decode(errors="replace").strip()
    try:
        answer = json.loads(body)
    except ValueError:
        return text or f"HTTP {status}"
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or text
    return str(error) or f"HTTP {status}"


def active_adapters(exposition: str) -> frozenset[str]:
    """Return the names of the adapters that running or waiting requests use.

    vLLM keeps the series of former combinations in its registry. A sample's value is its time, so only the newest
    sample of each engine process counts. If no request is running or waiting, that sample is outdated and no adapter is
    active.
    """
    newest: dict[str, tuple[float, frozenset[str]]] = {}
    counts: list[float] = []
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name in ACTIVE:
                counts.append(sample.value)
            if sample.name != INFO:
                continue
            listed = (sample.labels.get("running_lora_adapters", ""), sample.labels.get("waiting_lora_adapters", ""))
            names = frozenset(name.strip() for part in listed for name in part.split(",") if name.strip())
            process = sample.labels.get("engine", "")
            if process not in newest or sample.value > newest[process][0]:
                newest[process] = (sample.value, names)
    if counts and not any(counts):
        return frozenset()
    return frozenset().union(*(names for _, names in newest.values()))


def process_start(exposition: str) -> float | None:
    """Return the start time of the engine's process in seconds since the epoch, or None if its metrics lack it."""
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == "process_start_time_seconds":
                return sample.value
    return None


class EngineClient:
    """The client of one engine."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, load_seconds: float = LOAD_SECONDS) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._load_seconds = load_seconds

    async def models(self) -> dict[str, str]:
        """Return the models that the engine lists: name -> root path. Raises EngineDown if it is not healthy."""
        await self._read("/health")
        try:
            listing = json.loads(await self._read("/v1/models"))
            return {model["id"]: str(model.get("root") or "") for model in listing["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise EngineDown(f"/v1/models: {error!r}") from error

    async def exposition(self) -> str:
        """Return the engine's Prometheus metrics as text."""
        return (await self._read("/metrics")).decode(errors="replace")

    async def load(self, name: str, path: str) -> None:
        """Load an adapter. If it is already loaded from the same path, this succeeds.

        Raises EngineRefused with the engine's message.
        """
        try:
            await self._change("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except EngineRefused as refusal:
            if "already been loaded" not in str(refusal) or (await self.models()).get(name) != path:
                raise

    async def unload(self, name: str) -> None:
        """Unload an adapter. If the engine does not have it, this succeeds."""
        try:
            await self._change("/v1/unload_lora_adapter", {"lora_name": name})
        except EngineRefused:
            if name in await self.models():
                raise

    async def _read(self, path: str) -> bytes:
        try:
            async with self._session.get(self._url + path, timeout=PROBE_TIMEOUT) as response:
                body = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise EngineDown(f"{path}: {error}", gone=True) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineDown(f"{path}: {error!r}") from error
        if response.status != 200:
            raise EngineDown(f"{path}: {response.status} {error_message(response.status, body)}")
        return body

    async def _change(self, path: str, body: Mapping[str, Any]) -> None:
        limits = aiohttp.ClientTimeout(total=self._load_seconds, sock_connect=2)
        try:
            async with self._session.post(self._url + path, json=body, timeout=limits) as response:
                answer = await response.read()
        except aiohttp.ServerTimeoutError as error:
            raise EngineDown(f"{path}: {error!r}") from error
        except TimeoutError as error:
            raise EngineSlow(f"{path}: the engine has not answered within {self._load_seconds:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineDown(f"{path}: {error!r}") from error
        if response.status == 200:
            return
        message = error_message(response.status, answer)
        if response.status in (429, 502, 503, 504):
            raise EngineDown(f"{path}: {response.status} {message}")
        if response.status in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            message = f"the engine has no {path}: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        raise EngineRefused(response.status, message)
