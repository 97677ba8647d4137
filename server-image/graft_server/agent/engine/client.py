"""A client for the engine's HTTP API (docs: vLLM's runtime LoRA loading): health, models, load, unload and metrics."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
from graft.bounded import Limits, OutOfBounds, parse_json
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from graft_server.agent.engine.access import Access
from graft_server.agent.engine.answers import AnswerTooLarge, beginning, received

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5, sock_connect=2)
HEADERS = {"Accept-Encoding": "identity"}
LOAD_SECONDS = 300.0  # the first load compiles kernels
MODELS = Limits(size=2 * 1024 * 1024, depth=8, values=50_000)  # vLLM describes a model by about 25 values
ERROR = Limits(size=64 * 1024, depth=8, values=500)
TOKENS = Limits(size=256 * 1024, depth=8, values=10_000)
TOP = 20  # likeliest tokens to ask for: the most that vLLM reports by default
METRICS_BYTES = 8 * 1024 * 1024  # vLLM adds a line for each combination of adapters that has run
MOST_MODELS = 2000
NAME_CHARS, PATH_CHARS, MESSAGE_CHARS = 253, 4096, 2000
MOST_PROCESSES = 256  # engine processes in one pod
INFO = "vllm:lora_requests_info"
ACTIVE = ("vllm:num_requests_running", "vllm:num_requests_waiting")
START = "process_start_time_seconds"
LINE = re.compile(rf"^({'|'.join(map(re.escape, (INFO, *ACTIVE, START)))})[{{ ].*$", re.MULTILINE)
PROCESS = re.compile(r'[{,]engine="([^"\\]*+)"')


class EngineDown(Exception):
    """The engine gave no usable answer.

    `gone`: nothing listens on the port, so a later answer comes from a new process.
    """

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class EngineSlow(Exception):
    """The engine did not answer a load or unload in time.

    It may have completed the request, or may still complete it.
    """


class EngineRefused(Exception):
    """The engine refused a load or unload."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def listed_models(body: bytes) -> dict[str, str]:
    """Return the models of GET /v1/models: name -> root path.

    Raises ValueError if the answer is not such a list (PURE).
    """
    listing = parse_json(body, MODELS, "the list of models")
    cards = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(cards, list) or len(cards) > MOST_MODELS:
        raise ValueError(f"data is not a list of at most {MOST_MODELS} models")
    found = {}
    for card in cards:
        name, root = (card.get("id"), card.get("root")) if isinstance(card, dict) else (None, None)
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS:
            raise ValueError(f"a model has no name of at most {NAME_CHARS} characters")
        found[name] = root if isinstance(root, str) and len(root) <= PATH_CHARS else ""
    return found


def error_message(status: int, body: bytes) -> str:
    """Return the message of an engine's error: from the nested or the older flat JSON form, or the first 500 bytes."""
    text = body[:500].decode(errors="replace").strip()
    try:
        answer = parse_json(body, ERROR, "the error")
    except OutOfBounds:
        return text or f"HTTP {status}"
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or text
    return str(error)[:MESSAGE_CHARS] or f"HTTP {status}"


def refusal(path: str, status: int, answer: bytes) -> EngineDown | EngineRefused:
    """Return the error for an answer that is not a 200: EngineDown if a retry may help (PURE)."""
    message = error_message(status, answer)
    if status in (429, 502, 503, 504):
        return EngineDown(f"{path}: {status} {message}")
    if status in (404, 405) and message in ("Not Found", "Method Not Allowed"):
        message = f"the engine has no {path}: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    return EngineRefused(status, message)


def next_tokens(body: bytes, count: int) -> list[dict[int, float]]:
    """Return the next tokens in an answer of /v1/completions: for each prompt, token id -> log-probability.

    Raises ValueError if the answer is not for `count` prompts of which each got one token (PURE).
    """
    answer = parse_json(body, TOKENS, "the answer")
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        raise ValueError(f"choices is not a list of {count} answers")
    found: dict[int, dict[int, float]] = {}
    for choice in choices:
        index, logprobs = (choice.get("index"), choice.get("logprobs")) if isinstance(choice, dict) else (None, None)
        top = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(index, int) or not isinstance(top, list) or len(top) != 1 or not isinstance(top[0], dict):
            raise ValueError("an answer has no top_logprobs of one token")
        found[index] = {
            int(token.removeprefix("token_id:")): float(value)
            for token, value in top[0].items()
            if token.startswith("token_id:") and isinstance(value, int | float)
        }
    if sorted(found) != list(range(count)) or not all(found.values()):
        raise ValueError("an answer has no log-probabilities of token ids")
    return [found[index] for index in range(count)]


def active_adapters(exposition: str) -> frozenset[str]:
    """Return the names of the adapters that running or waiting requests use. Raises ValueError (PURE).

    vLLM keeps the series of former combinations in its registry. A sample's value is its time, so only the newest
    sample of each engine process counts. If no request is running or waiting, that sample is outdated and no adapter is
    active.
    """
    newest: dict[str, tuple[float, str]] = {}
    counts: list[float] = []
    for name, line in _lines(exposition):
        if name in ACTIVE and len(counts) < MOST_PROCESSES * len(ACTIVE):
            counts += [sample.value for sample in _samples(line)]
        if name != INFO:
            continue
        match, value = PROCESS.search(line), float(line.rpartition(" ")[2])
        process = match[1] if match else ""
        if process not in newest or value > newest[process][0]:
            newest[process] = (value, line)
        if len(newest) > MOST_PROCESSES:
            raise ValueError(f"the metrics are of more than {MOST_PROCESSES} engine processes")
    if counts and not any(counts):
        return frozenset()
    return frozenset().union(*(_adapters(sample) for _, line in newest.values() for sample in _samples(line)))


def process_start(exposition: str) -> float | None:
    """Return the start time of the engine's process in seconds since the epoch, or None if its metrics lack it (PURE)."""
    found = (sample.value for name, line in _lines(exposition) if name == START for sample in _samples(line))
    return next(found, None)


def _lines(exposition: str) -> Iterator[tuple[str, str]]:
    """Yield (metric, line) of the metrics that the agent reads. The parser needs far more time and memory for all lines."""
    for match in LINE.finditer(exposition):
        yield match[1], match[0]


def _samples(line: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(line + "\n"):
        yield from family.samples


def _adapters(sample: Sample) -> frozenset[str]:
    listed = (sample.labels.get("running_lora_adapters", ""), sample.labels.get("waiting_lora_adapters", ""))
    return frozenset(name.strip() for part in listed for name in part.split(",") if name.strip())


class EngineClient:
    """The client of one engine."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        access: Access | None = None,  # None: the engine answers everybody
        *,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._load_seconds = load_seconds
        self._headers = HEADERS | (access.headers if access else {})
        self._ssl = access.ssl if access else True

    async def models(self) -> dict[str, str]:
        """Return the models that the engine lists: name -> root path. Raises EngineDown if it is not healthy."""
        await self._read("/health", ERROR.size)
        try:
            return listed_models(await self._read("/v1/models", MODELS.size))
        except ValueError as error:
            raise EngineDown(f"/v1/models: {error}") from error

    async def exposition(self) -> str:
        """Return the engine's Prometheus metrics as text."""
        return (await self._read("/metrics", METRICS_BYTES)).decode(errors="replace")

    async def load(self, name: str, path: str) -> None:
        """Load an adapter. If it is already loaded from the same path, this succeeds.

        Raises EngineRefused with the engine's message.
        """
        try:
            await self._change("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except EngineRefused as refusal:
            if "already been loaded" not in str(refusal) or (await self.models()).get(name) != path:
                raise

    async def next_tokens(self, model: str, prompts: list[list[int]]) -> list[dict[int, float]]:
        """Return the likeliest next tokens after each prompt: token id -> log-probability in nats.

        Raises EngineRefused with the engine's message, or if the answer has no such tokens.
        """
        path = "/v1/completions"
        body = {
            "model": model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": TOP,
            "return_tokens_as_token_ids": True,
        }
        status, answer = await self._post(path, body, TOKENS.size)
        if status != 200:
            raise refusal(path, status, answer)
        try:
            return next_tokens(answer, len(prompts))
        except ValueError as error:
            raise EngineRefused(status, f"{path}: {error}") from error

    async def unload(self, name: str) -> None:
        """Unload an adapter. If the engine does not have it, this succeeds."""
        try:
            await self._change("/v1/unload_lora_adapter", {"lora_name": name})
        except EngineRefused:
            if name in await self.models():
                raise

    async def _read(self, path: str, most: int) -> bytes:
        """Return the body of a probe's answer, of at most `most` bytes. A redirect is not followed."""
        try:
            async with self._session.get(
                self._url + path,
                timeout=PROBE_TIMEOUT,
                headers=self._headers,
                ssl=self._ssl,
                auto_decompress=False,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    error = error_message(response.status, await beginning(response, ERROR.size))
                    raise EngineDown(f"{path}: {response.status} {error}")
                return await received(response, most)
        except aiohttp.ClientConnectorError as error:
            raise EngineDown(f"{path}: {error}", gone=True) from error
        except (aiohttp.ClientError, TimeoutError, OSError, AnswerTooLarge) as error:
            raise EngineDown(f"{path}: {error!r}") from error

    async def _change(self, path: str, body: Mapping[str, Any]) -> None:
        status, answer = await self._post(path, body, ERROR.size)
        if status != 200:
            raise refusal(path, status, answer)

    async def _post(self, path: str, body: Mapping[str, Any], most: int) -> tuple[int, bytes]:
        """Return the status and the first `most` bytes of the answer. Raises EngineDown or EngineSlow."""
        limits = aiohttp.ClientTimeout(total=self._load_seconds, sock_connect=2)
        try:
            async with self._session.post(
                self._url + path,
                json=body,
                timeout=limits,
                headers=self._headers,
                ssl=self._ssl,
                auto_decompress=False,
                allow_redirects=False,
            ) as response:
                return response.status, await beginning(response, most)
        except aiohttp.ServerTimeoutError as error:
            raise EngineDown(f"{path}: {error!r}") from error
        except TimeoutError as error:
            raise EngineSlow(f"{path}: the engine has not answered within {self._load_seconds:.0f} s") from error
        except (aiohttp.ClientError, OSError, AnswerTooLarge) as error:
            raise EngineDown(f"{path}: {error!r}") from error
