"""How fast the version answers: time to the first token and per further token, beside the base model's, one request at a time.

These are transformers' own kernels on this machine; a serving engine batches and is faster. What carries over is the ratio.
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
PATIENCE = 3
# A variant is a context in which it can be measured; the context yields the model to ask.
Variant = Callable[[], AbstractContextManager[Any]]


class Clock(BaseStreamer):  # type: ignore[misc]
    """When each token came. generate() hands every token over on the CPU, so a GPU has finished by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clock":
        """peft copies generate()'s arguments for a soft prompt of an encoder; there is one clock all the same."""
        return self

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The last token was handed over already."""


def measure_latency(
    variants: Mapping[str, Variant], prompt: list[int], pad: int, seconds: float
) -> LatencyAnalysis | None:
    """Medians over FEWEST to MOST runs of each variant, in turn, so that whatever else the machine does hits all alike.

    As many as fit into `seconds`; None where FEWEST would take PATIENCE times as long: a large model on a CPU.
    """
    begin = time.monotonic()
    # Allocations and the compilation of kernels are nobody's latency; the second token tells what a run will take.
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
    """(seconds to the first token, median seconds of a further one)."""
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
    tokens = clock.times[1:]  # what comes first is the prompt
    return tokens[0] - started, statistics.median(b - a for a, b in pairwise(tokens))


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The model with its low-rank update added to the weights, and taken out again. In 16 bits that rounds the base's
    weights, which nothing that follows depends on."""
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")
