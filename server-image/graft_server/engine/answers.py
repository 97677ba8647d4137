"""The bridge between the event loop and the engine's thread: requests become sequences, outputs become answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from types import TracebackType

from graft_server.engine.generation import Engine, OverloadedError, StoppedError
from graft_server.engine.metrics import Metrics
from graft_server.engine.model import BaseModel, PromptError
from graft_server.engine.protocol import (
    MAX_PROMPTS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    bad_request,
    unavailable,
    unknown_model,
)
from graft_server.engine.registry import AdapterRegistry, Registered
from graft_server.engine.residency import Adapter
from graft_server.engine.sampling import Sampling
from graft_server.engine.sequence import Output, Sequence
from graft_server.engine.text import TextStream
from graft_server.threads import in_thread

Request = ChatRequest | CompletionRequest
DEFAULT_COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions; a chat answer may fill the context


class Answers:
    """The sequences of one request, in the order of the answer's choices.

    An async context manager: on exit it cancels the sequences that still run. Iterate it to get (choice, Output) pairs
    as they arrive.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.sequences: list[Sequence] = []
        self.echoes: list[str] = []  # by choice: the text that precedes the answer
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._open: set[int] = set()
        self._last_token: dict[int, float] = {}

    def add(self, sequence: Sequence, echo: str) -> None:
        """Add a choice. Call this before `start`."""
        index = len(self.sequences)
        self.echoes.append(echo)
        sequence.emit = lambda output: self._emit(index, output)
        self.sequences.append(sequence)
        self._open.add(index)

    def start(self) -> None:
        """Queue all choices. Raises ApiError 503 if the queue is full or the server shuts down."""
        try:
            self._engine.submit(self.sequences)
        except OverloadedError as error:
            raise unavailable("the server is overloaded: its queue is full") from error
        except StoppedError as error:
            raise unavailable("the server is shutting down") from error
        for sequence in self.sequences:
            self._metrics.started(len(sequence.prompt))

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._engine.cancel([self.sequences[index] for index in self._open])
            for index in self._open:
                self._metrics.finished("abort", time.monotonic() - self.sequences[index].arrived)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        """Yield outputs until every choice has ended. Raises ApiError if a choice fails."""
        while self._open:
            index, output = await self._outputs.get()
            self._measure(index, output)
            if output.error is not None:
                raise _failure(output)
            yield index, output

    def _emit(self, index: int, output: Output) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    def _measure(self, index: int, output: Output) -> None:
        sequence, now = self.sequences[index], time.monotonic()
        if output.tokens:
            self.completion_tokens += 1
            last = self._last_token.get(index)
            queued = (sequence.started or now) - sequence.arrived
            self._metrics.token(now - sequence.arrived, last and now - last, queued)
            self._last_token[index] = now
        if output.finish_reason:
            self._open.discard(index)
            self._metrics.finished(output.finish_reason, now - sequence.arrived)


class Generator:
    """The converter of parsed requests into Answers."""

    def __init__(
        self,
        base: BaseModel,
        base_names: tuple[str, ...],
        engine: Engine,
        registry: AdapterRegistry,
        metrics: Metrics,
        max_sequences: int,
        request_timeout: float,
        *,
        trusts_templates: bool = False,
    ) -> None:
        self._base = base
        self._base_names = base_names
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._max_sequences = max_sequences  # limit of sequences in the engine, running and queued
        self._request_timeout = request_timeout
        self._trusts_templates = trusts_templates
        self._tokenizing = asyncio.Lock()  # beside the event loop, one request at a time
        self._arriving = 0  # requests in that thread or waiting for it

    async def start(self, request: Request) -> Answers:
        """Queue a request. Raises ApiError if it cannot be served."""
        self._entry(request.model)  # refuse an unknown model before any work
        prompts = await self._prompts(request)
        n = request.n or 1
        if len(prompts) * n > self._max_sequences:
            raise bad_request(
                f"prompt and n ask for {len(prompts) * n} answers; at most {self._max_sequences} are allowed"
            )

        # Look the model up again. From here to the queue there is no await, and queued sequences survive an unload.
        entry = self._entry(request.model)
        adapter = entry.adapter if entry else None
        answers = Answers(self._engine, self._metrics)
        for prompt in prompts:
            max_tokens = self._max_tokens(request, len(prompt), entry.virtual_tokens if entry else 0)
            echo = self._echo(request, prompt)
            for choice in range(n):
                answers.add(self._sequence(request, prompt, adapter, max_tokens, choice), echo)
        answers.prompt_tokens = sum(len(prompt) for prompt in prompts)
        answers.start()
        return answers

    async def _prompts(self, request: Request) -> list[list[int]]:
        """Return the request's prompts as token ids. Raises ApiError 503 if too many requests wait for that."""
        if self._arriving >= self._max_sequences:
            raise unavailable("the server is overloaded: too many requests arrive at once")
        self._arriving += 1
        try:
            return await in_thread(self._tokenizing, self._tokenize, request)
        except PromptError as error:
            raise bad_request(str(error)) from error
        finally:
            self._arriving -= 1

    def _entry(self, name: str | None) -> Registered | None:
        if not name or name in self._base_names:
            return None
        if name not in self._registry.entries:
            raise unknown_model(name)
        return self._registry.entries[name]

    def _tokenize(self, request: Request) -> list[list[int]]:
        if isinstance(request, ChatRequest):
            messages = [message.for_template() for message in request.messages]
            arguments = request.chat_template_kwargs or {}
            if request.chat_template is not None or request.add_special_tokens:
                return [self._base.encode_templated(messages, self._trusted(request), request.tools_for_template)]
            return [self._base.encode_chat(messages, arguments, request.tools_for_template)]
        prompts = request.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise PromptError(f"prompt: {len(prompts)} prompts in one request; at most {MAX_PROMPTS} are allowed")
        encoded = [self._base.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        for ids in encoded:
            if not ids:
                raise PromptError("prompt: it must have at least one token")
            if not all(0 <= token < self._base.vocab_size for token in ids):
                raise PromptError(f"prompt: token ids must be from 0 to {self._base.vocab_size - 1}")
        return encoded

    def _trusted(self, request: ChatRequest) -> str:
        """Return the chat template of the request. The tokenizer begins its prompt as that of a completion."""
        if self._trusts_templates and request.chat_template and request.add_special_tokens:
            return request.chat_template
        name = "add_special_tokens" if request.chat_template is None else "chat_template"
        if not self._trusts_templates:
            raise bad_request(f"{name}: this engine does not support it", name)
        raise bad_request("chat_template: it needs add_special_tokens: true, and the other way round", name)

    def _echo(self, request: Request, prompt: list[int]) -> str:
        if isinstance(request, ChatRequest) or not request.echo:
            return ""
        if request.alternatives is not None and self._base.start_token is not None:
            raise bad_request("echo with logprobs: an encoder-decoder model has no logprobs for its prompt", "echo")
        return request.prompt if isinstance(request.prompt, str) else self._base.decode(prompt)

    def _max_tokens(self, request: Request, prompt_tokens: int, virtual_tokens: int) -> int:
        limit = self._base.max_model_len
        wanted = request.max_tokens
        if isinstance(request, ChatRequest):
            wanted = request.max_completion_tokens or wanted
        used = prompt_tokens + virtual_tokens
        if self._base.start_token is not None:  # the encoder holds the prompt and the decoder the answer
            if max(used, wanted or 1) > limit:
                raise bad_request(
                    f"This model's maximum length is {limit} tokens for the prompt and as many for the answer. However, "
                    f"you requested {wanted or 1} output tokens and your prompt contains {used} input tokens.",
                    "max_tokens" if used <= limit else "prompt",
                )
            used = 0
        if wanted is None and isinstance(request, CompletionRequest):
            wanted = min(DEFAULT_COMPLETION_TOKENS, max(limit - used, 1))
        total = used + (wanted or 1)
        if total > limit:
            raise bad_request(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted or 1} output "
                f"tokens and your prompt contains {used} input tokens, for a total of {total} tokens. "
                "Please reduce the length of the prompt or max_tokens.",
                "max_tokens" if used < limit else "prompt",
            )
        return wanted or limit - used

    def _sequence(
        self, request: Request, prompt: list[int], adapter: Adapter | None, max_tokens: int, choice: int
    ) -> Sequence:
        echoes_logprobs = isinstance(request, CompletionRequest) and request.echo and request.alternatives is not None
        sampling = self._sampling(request, choice)
        ends = frozenset() if request.ignore_eos else self._base.eos_ids
        ends |= frozenset(request.stop_token_ids or ())
        if request.min_tokens and len(ends) >= self._base.vocab_size:
            raise bad_request("min_tokens: every token would end the answer; set fewer stop_token_ids", "min_tokens")
        return Sequence(
            prompt=prompt,
            adapter=adapter,
            sampling=sampling,
            max_tokens=max_tokens,
            eos_ids=ends,
            text=TextStream(
                self._base.tokenizer,
                prompt,
                request.stop_strings,
                special_tokens=isinstance(request, ChatRequest) and request.reads_calls,
            ),
            emit=_nobody,
            wants_prompt_logprobs=bool(echoes_logprobs),
            expires=time.monotonic() + self._request_timeout,
        )

    def _sampling(self, request: Request, choice: int) -> Sampling:
        defaults = self._base.defaults
        for field, tokens in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
            if not all(0 <= token < self._base.vocab_size for token in tokens or ()):
                raise bad_request(f"{field}: token ids must be from 0 to {self._base.vocab_size - 1}", field)
        return Sampling(
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            top_k=max(defaults.top_k if request.top_k is None else request.top_k, 0),
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or defaults.repetition_penalty,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.logit_bias or {},
            min_tokens=request.min_tokens or 0,
            seed=None if request.seed is None else (request.seed + choice + 2**63) % 2**64 - 2**63,
            logprobs=request.alternatives,
        )


def _nobody(output: Output) -> None:
    """Ignore the output of a sequence that does not belong to Answers yet."""


def _failure(output: Output) -> ApiError:
    message = output.error or ""
    if output.finish_reason == "abort":
        return unavailable(message)
    if output.finish_reason == "timeout":
        return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError", message)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", message)
