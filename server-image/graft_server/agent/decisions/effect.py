"""Decide whether a loaded adapter changes the answers as it did when it was published (PURE).

The engine is asked for the likeliest next tokens after the recorded prompts, of the base model and of the adapter. Only
the change counts, because the answers themselves differ with the data type and with quantisation. The base model's own
difference from the record shows how large such differences are on this engine.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graft.artifacts.manifest import Effect, EffectPrompt

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

Answer = Mapping[int, float]  # token id -> log-probability in nats, of the likeliest next tokens

# Nats, root mean square over all tokens. A recorded change below it cannot be told from rounding in 16 bits.
NOTICEABLE = 0.02
ABSENT = 0.1  # of the recorded change: a smaller change is none
# The change may differ from the recorded one by ROUNDING nats, by this share of it, and by some times what the base
# model's own answers differ. Another adapter's change differs by at least the whole.
ROUNDING, SHARE, TIMES = 0.02, 0.25, 3.0
# Nats, of any token. Without a record of the answers, a smaller change is none: equal requests differ less on a CPU.
ANY = 0.001


@dataclass(frozen=True)
class Change:
    """The changes in nats over all prompts and tokens: as recorded, as served, and of the base model from its record."""

    recorded: float
    served: float
    error: float
    noise: float


def check_effect(effect: Effect | None, base: Sequence[Answer], adapter: Sequence[Answer]) -> str | None:
    """Return why nothing could be compared, or None if the adapter works. One answer is given for each prompt.

    Raises AdapterError if the adapter changes nothing, or something else than it did when it was published.
    """
    if effect is None:
        return "its effect was not checked: the version has no record of it"
    if not any(prompt.tokens for prompt in effect.prompts):
        largest = max(map(_largest, base, adapter))
        if largest < ANY:
            raise _without_effect(f"the log-probabilities with and without it differ by at most {largest:.4f} nats")
        if effect.unmeasured is None:  # an earlier Graft recorded no reason
            return None
        return f"it changes the answers. Its effect was not compared, because it was not measured: {effect.unmeasured}"
    found = change(effect.prompts, base, adapter)
    if found.recorded < NOTICEABLE:
        return (
            f"its effect was not compared: {found.recorded:.4f} nats were recorded when it was published, which is too "
            "little to measure"
        )
    if found.served < ABSENT * found.recorded:
        raise _without_effect(
            f"it changes the log-probabilities by {found.served:.3f} nats, but by {found.recorded:.3f} when it was published"
        )
    if found.error > ROUNDING + SHARE * found.recorded + TIMES * found.noise:
        raise AdapterError(
            AdapterReason.LOADED_WITH_OTHER_EFFECT,
            f"the engine loaded the adapter with another effect: its change of the log-probabilities differs by "
            f"{found.error:.3f} nats from the change of {found.recorded:.3f} nats when it was published. "
            "Check that the engine serves the base model on which the adapter was tuned, and supports its target modules",
        )
    return None


def change(prompts: Sequence[EffectPrompt], base: Sequence[Answer], adapter: Sequence[Answer]) -> Change:
    """Compare the answers with the record."""
    recorded: list[float] = []
    served: list[float] = []
    noise: list[float] = []
    for prompt, without, with_it in zip(prompts, base, adapter, strict=True):
        # An engine reports only the likeliest tokens. Any other token is at most as likely as the last of them.
        low, low_with = min(without.values()), min(with_it.values())
        for token, base_then, then in zip(prompt.tokens, prompt.base, prompt.adapter, strict=True):
            base_now, now = without.get(token, low), with_it.get(token, low_with)
            recorded.append(max(then, low_with) - max(base_then, low))
            served.append(now - base_now)
            noise.append(base_now - max(base_then, low))
    errors = [there - then for there, then in zip(served, recorded, strict=True)]
    return Change(_size(recorded), _size(served), _size(errors), _size(noise))


def _size(values: Sequence[float]) -> float:
    """Return the root mean square."""
    return math.sqrt(sum(value * value for value in values) / max(1, len(values)))


def _largest(without: Answer, with_it: Answer) -> float:
    """Return the largest change of a token that both answers report, or of one that only one of them reports."""
    low, low_with = min(without.values()), min(with_it.values())
    tokens: Iterable[int] = without.keys() | with_it.keys()
    return max(abs(with_it.get(token, low_with) - without.get(token, low)) for token in tokens)


def _without_effect(what: str) -> AdapterError:
    return AdapterError(
        AdapterReason.LOADED_WITHOUT_EFFECT,
        f"the engine loaded the adapter without effect: {what}. The names of its tensors probably do not match the "
        "modules of the engine's model. Serve it with the other engine (spec.engine), or tune or import it again",
    )
