"""From the logits of one sequence to its next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

GREEDY_BELOW = 1e-5  # a temperature under this is greedy, as in vLLM


@dataclass(frozen=True)
class Sampling:
    """How one sequence picks its tokens. `top_k` 0 is no limit; `seed` None is a fresh one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def generator(self) -> Any:
        """A generator of this sequence's own, so that its draws do not depend on what shares its batch."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def next_token(logits: Any, sampling: Sampling, generator: Any) -> int:
    """Picks a token from the logits [vocab] of one sequence.

    Raises ValueError where the logits are not numbers, as with an adapter whose weights have overflowed.
    """
    logits = logits.float()
    if torch.isnan(logits).any():
        raise ValueError("the model's output is not a number")
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1.0:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _nucleus(probabilities: Any, top_p: float) -> Any:
    """Zeroes all but the likeliest tokens that together reach top_p (Holtzman et al., arXiv:1904.09751)."""
    ordered, indices = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    before[0] = 0.0  # the likeliest token always stays
    ordered[before >= top_p] = 0.0
    ordered[0] = ordered[0].clamp_min(torch.finfo(ordered.dtype).tiny)
    return torch.zeros_like(probabilities).scatter_(0, indices, ordered)
