"""The choice of a sequence's next token from its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

GREEDY_BELOW = 1e-5  # below this temperature sampling is greedy, as in vLLM
NUCLEUS_GUESS = 1024  # likeliest tokens sorted first; the whole vocabulary is sorted only if they do not reach top_p


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of one sequence, with vLLM's names.

    `top_k` 0 means no limit. `seed` None means a random seed. `logprobs` is the number of alternatives to report beside
    each token, or None for no report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability under the model (before temperature and penalties), and the likeliest ones.

    `logprob` is None for a text's first token, which no token precedes, and if no report was requested.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The token choices of one sequence. It has its own random generator."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), end_ids: frozenset[int] = frozenset()) -> None:
        self._sampling = sampling
        self._prompt = prompt
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.long)
        self._biased_ids = torch.tensor([*sampling.logit_bias], dtype=torch.long)
        self._biases = torch.tensor([*sampling.logit_bias.values()], dtype=torch.float32)
        self._generated: list[int] = []
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: Any) -> TokenLogprob:
        """Pick a token from the logits [vocab].

        Raises ValueError if the highest logit is not finite, for example if an adapter's weights have overflowed.
        """
        logits = logits.float()
        if not torch.isfinite(logits.max()):  # the maximum of a NaN and a number is NaN
            raise ValueError("the model's output is not a number: the weights of the adapter or the model overflow")
        token = self._choose(logits)
        self._generated.append(token)
        if self._sampling.logprobs is None:
            return TokenLogprob(token, None)
        return report(logits, token, self._sampling.logprobs)

    def _choose(self, logits: Any) -> int:
        sampling = self._sampling
        logits = self._biased(logits)
        if sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        logits = logits / sampling.temperature
        if sampling.min_p > 0:
            threshold = logits.max() + torch.tensor(sampling.min_p).log()
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        if 0 < sampling.top_k < logits.shape[-1]:
            threshold = logits.topk(sampling.top_k).values[-1]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if sampling.top_p < 1.0:
            probabilities = _nucleus(probabilities, sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _biased(self, logits: Any) -> Any:
        """Return the logits after penalties (repetition: arXiv:1909.05858; frequency and presence: OpenAI's API), the
        request's logit_bias and min_tokens."""
        sampling = self._sampling
        copied = logits.clone()
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *self._generated}), dtype=torch.long)
            values = copied[seen]
            penalty = sampling.repetition_penalty
            copied[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (sampling.frequency_penalty or sampling.presence_penalty) and self._generated:
            counts = torch.bincount(torch.tensor(self._generated), minlength=len(copied))
            copied -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        copied[self._biased_ids] += self._biases
        if len(self._generated) < sampling.min_tokens:
            copied[self._end_ids] = float("-inf")
        return copied


def report(logits: Any, token: int, alternatives: int) -> TokenLogprob:
    """Return the log-probability of a token under logits [vocab], and those of the `alternatives` likeliest tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(min(alternatives, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


def _nucleus(probabilities: Any, top_p: float) -> Any:
    """Set all but the likeliest tokens that together reach top_p to zero (Holtzman et al., arXiv:1904.09751)."""
    ordered, indices = probabilities.topk(min(NUCLEUS_GUESS, len(probabilities)))
    if float(ordered.sum()) < top_p:
        ordered, indices = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    before[0] = 0.0  # the likeliest token always stays
    ordered[before >= top_p] = 0.0
    ordered[0] = ordered[0].clamp_min(torch.finfo(ordered.dtype).tiny)
    return torch.zeros_like(probabilities).scatter_(0, indices, ordered)
