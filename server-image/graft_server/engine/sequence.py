"""One answer in the making: what it asks for, and what it says when it gets its next token."""

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
    """What a sequence says after a turn: new text, and at the end why it ended (`error` says what went wrong).

    `tokens` counts all that were generated. `prompt_logprobs` come first, where they were asked for.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False)
class Sequence:
    """One answer. `emit` is called on the engine's thread and must not block. `expires` is monotonic time."""

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
    passed_over: float | None = None  # since when others overtake it
    context: Context | None = None
    lora: Row | None = None  # for its steps
    read: int = 0  # tokens of the prompt that were read
    last: int = 0  # the newest token
    generated: int = 0
    _sampler: Sampler | None = None
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def begin(self, context: Context, weights: Any) -> None:
        """The sequence runs from now on; `weights` are its adapter's."""
        self.started = time.monotonic()
        self.context = context
        self._sampler = Sampler(self.sampling, self.prompt, self.eos_ids)
        if self.adapter and isinstance(weights, LoraWeights):
            self.lora = Row(self.adapter.key, weights)

    def note_prompt(self, logits: Any, first: int) -> None:
        """Takes the logits [tokens, vocab] of the prompt's tokens from `first` on, for its log-probabilities."""
        if not first:
            self._prompt_logprobs.append(TokenLogprob(self.prompt[0], None))
        for offset, row in enumerate(logits):
            if first + offset + 1 < len(self.prompt):
                token = self.prompt[first + offset + 1]
                self._prompt_logprobs.append(report(row, token, self.sampling.logprobs or 0))

    def advance(self, logits: Any) -> Output:
        """Picks the next token from logits [vocab]. Returns what it says, for the caller to emit."""
        if self._sampler is None:
            raise RuntimeError("advance before begin")
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
