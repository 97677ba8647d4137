"""One answer during its generation: the request's parameters, the state, and the output of each turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graft_server.engine.lora import LoraWeights, Row
from graft_server.engine.network import Context
from graft_server.engine.residency import Adapter
from graft_server.engine.sampling import Sampler, Sampling, TokenLogprob, report
from graft_server.engine.text import TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The output of a sequence after a turn: new text, and at the end the reason. `error` says what failed.

    `tokens` counts all tokens generated so far. `prompt_logprobs` come with the first output, if they were requested.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False)
class Sequence:
    """One answer. `emit` is called on the engine's thread and must not block. `expires` is in time.monotonic()."""

    prompt: list[int]
    adapter: Adapter | None
    sampling: Sampling
    max_tokens: int
    eos_ids: frozenset[int]
    text: TextStream
    emit: Callable[[Output], None]
    wants_prompt_logprobs: bool = False
    expires: float = float("inf")
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    cancelled: bool = False
    passed_over: float | None = None  # monotonic time since when other sequences overtake it
    context: Context | None = None
    lora: Row | None = None  # the adapter's matrices for its steps; None for the base model or a tuned prompt
    read: int = 0  # tokens of the prompt that were read
    last: int = 0  # the newest token
    generated: int = 0
    _sampler: Sampler | None = None
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def begin(self, context: Context, weights: Any) -> None:
        """Start the sequence. `weights` are its adapter's, or None."""
        self.started = time.monotonic()
        self.context = context
        self._sampler = Sampler(self.sampling, self.prompt, self.eos_ids)
        if self.adapter and isinstance(weights, LoraWeights):
            self.lora = Row(self.adapter.key, weights)

    def note_prompt(self, logits: Any, first: int) -> None:
        """Record the prompt's log-probabilities from the logits [tokens, vocab] of its tokens from `first` on."""
        if not first:
            self._prompt_logprobs.append(TokenLogprob(self.prompt[0], None))
        for offset, row in enumerate(logits):
            if first + offset + 1 < len(self.prompt):
                token = self.prompt[first + offset + 1]
                self._prompt_logprobs.append(report(row, token, self.sampling.logprobs or 0))

    def advance(self, logits: Any) -> Output:
        """Pick the next token from logits [vocab]. Return the Output, which the caller must emit."""
        if self._sampler is None:
            raise RuntimeError("advance was called before begin")
        try:
            picked = self._sampler.pick(logits)
            self.last = picked.token
            self.generated += 1
            reason = None
            if picked.token in self.eos_ids:
                text, reason = self.text.finish(), "stop"
            else:
                text = self.text.push(picked.token)
                if self.text.stopped:
                    reason = "stop"
                elif self.generated >= self.max_tokens:
                    text += self.text.finish()
                    reason = "stop" if self.text.stopped else "length"
        except Exception as error:
            log.exception("picking a token failed")
            return Output(finish_reason="error", error=str(error))
        shown = self.sampling.logprobs is not None and picked.token not in self.eos_ids
        before, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return Output(text, self.generated, reason, logprob=picked if shown else None, prompt_logprobs=before)
