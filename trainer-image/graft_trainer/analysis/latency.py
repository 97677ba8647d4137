"""Measure the latency of the version and of the base model: time to the first token and per further token, for one
request at a time.

The model runs with transformers' own kernels on this machine. A serving engine batches requests and is faster, but the
ratio to the base model carries over.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from graft.report.document import Latency, LatencyAnalysis
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

FEWEST, MOST = 5, 25  # runs of each variant
NEW_TOKENS = 16
PATIENCE = 3  # times the given seconds, after which the measurement is given up
# Opens a context that yields the model to measure.
Variant = Callable[[], AbstractContextManager[Any]]


class Clock(BaseStreamer):  # type: ignore[misc]
    """Record when each token came. generate() passes every token as a CPU tensor, so a GPU has finished it by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clock":
        """Return the same clock. For a soft prompt of an encoder, peft copies the arguments of generate()."""
        return self

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing. put() has received the last token already."""


def measure_latency(
    variants: Mapping[str, Variant], prompt: list[int], pad: int, seconds: float
) -> LatencyAnalysis | None:
    """Return the medians over FEWEST to MOST runs of each variant, as many as fit into `seconds`.

    The variants take turns, so that other load on the machine affects all of them equally. Return None if FEWEST runs
    would take more than PATIENCE times `seconds`, for example for a large model on a CPU.
    """
    begin = time.monotonic()
    # The first round does not count, because it allocates memory and compiles kernels. Its second token shows the time
    # of a run.
    probe = _round(variants, prompt, pad, 2)
    if FEWEST * NEW_TOKENS * sum(further for _, further in probe.values()) > PATIENCE * seconds:
        return None
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    runs = 0
    while runs < FEWEST or (runs < MOST and (time.monotonic() - begin) * (runs + 1) / runs < seconds):
        if time.monotonic() - begin > PATIENCE * seconds:
            return None
        for name, times in _round(variants, prompt, pad, NEW_TOKENS).items():
            seen[name].append(times)
        runs += 1
    return LatencyAnalysis(
        variants={
            name: Latency(
                prefill_seconds=_short(statistics.median(first for first, _ in times)),
                seconds_per_token=_short(statistics.median(further for _, further in times)),
            )
            for name, times in seen.items()
        },
        runs=runs,
        prompt_tokens=len(prompt),
        new_tokens=NEW_TOKENS,
    )


def _round(variants: Mapping[str, Variant], prompt: list[int], pad: int, new: int) -> dict[str, tuple[float, float]]:
    times = {}
    for name, variant in variants.items():
        with variant() as model:
            times[name] = _ask(model, prompt, pad, new)
    return times


def _ask(model: Any, prompt: list[int], pad: int, new: int) -> tuple[float, float]:
    """Return (seconds to the first token, median seconds per further token)."""
    ids = torch.tensor([prompt], device=model.device)
    config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=pad)
    clock, training = Clock(), model.training
    model.eval()
    try:
        with torch.inference_mode():
            started = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    finally:
        model.train(training)
    tokens = clock.times[1:]  # the first call of put() passes the prompt
    return tokens[0] - started, statistics.median(b - a for a, b in pairwise(tokens))


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Yield the model with its low-rank update merged into the weights, then unmerge it. In 16 bits this rounds the
    base model's weights, but nothing that follows depends on them."""
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")
