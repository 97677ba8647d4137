"""Analyse the update for the report: its spectrum, the change of the hidden states, and the latency of the version.

The time is bounded. If the model is large, only samples are analysed. The analysis runs on the trained model before it
is published. If a part of the analysis fails, the report lacks that part, but the version is published.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from graft.report.document import Analysis, LatencyAnalysis, LayerSimilarity, RepresentationAnalysis, UpdateAnalysis

from graft_trainer.analysis.latency import Variant, measure_latency, merged
from graft_trainer.analysis.similarity import FEWEST, Batch, choose, cka, grams
from graft_trainer.analysis.spectra import update_of
from graft_trainer.data.tokens import Collator, Tokenised, pad_token
from graft_trainer.run.failures import out_of_memory

if TYPE_CHECKING:
    from graft_trainer.train import Trained

log = logging.getLogger(__name__)
UPDATE_SECONDS = 15.0
LATENCY_SECONDS = 8.0
EXAMPLES = 32  # number of examples whose hidden states are compared
TOKENS = 512  # compared tokens in all; the Gram matrices are tokens x tokens
LONGEST = 512  # tokens of an example that the model reads
AT_ONCE = 4  # examples in a batch
PROMPT = 64  # tokens of the prompt for the latency
Part = TypeVar("Part")


def analyse(trained: "Trained") -> Analysis:
    """Return the whole analysis. If a part is absent, the notes say why."""
    started, notes = time.monotonic(), list[str]()
    with ExitStack() as stack:
        open_base = trained.base_model
        if trained.method == "full":  # the base model is a separate model, loaded once for all parts
            base = _part("the base model", lambda: stack.enter_context(trained.base_model()), notes)
            if base is None:
                return Analysis(notes=notes)
            open_base = lambda: nullcontext(base)  # noqa: E731
        update = _part("the update", lambda: _update(trained, open_base, notes), notes)
        representation = _part("the hidden states", lambda: _representation(trained, open_base, notes), notes)
        # Last, because merging rounds the base model's weights.
        latency = _part("the latency", lambda: _latency(trained, open_base, notes), notes)
    return Analysis(
        update=update,
        representation=representation,
        latency=latency,
        notes=notes,
        seconds=round(time.monotonic() - started, 2),
    )


def _part(name: str, compute: Callable[[], Part], notes: list[str]) -> Part | None:
    started = time.monotonic()
    try:
        found = compute()
    except Exception as error:
        log.exception("%s could not be analysed", name)
        if out_of_memory(error):
            notes.append(f"There was not enough memory to analyse {name}.")
            torch.cuda.empty_cache()
        else:
            notes.append(f"{name.capitalize()} could not be analysed: {type(error).__name__}: {error}")
        return None
    log.info("analysed %s in %.1f s", name, time.monotonic() - started)
    return found


def _update(trained: "Trained", open_base: Variant, notes: list[str]) -> UpdateAnalysis:
    with open_base() as base:
        found = update_of(trained.model, base, trained.method, time.monotonic() + UPDATE_SECONDS)
    if len(found.matrices) < found.total:
        notes.append(f"The spectrum covers a sample: {len(found.matrices)} of the {found.total} trained matrices.")
    return found


def _examples(trained: "Trained") -> Sequence[Tokenised]:
    """Return held-out examples, or training examples if there are none, evenly spread over the file."""
    source = (trained.held_out or trained.train).examples
    step = max(1.0, len(source) / EXAMPLES)
    return [source[int(index * step)] for index in range(min(len(source), EXAMPLES))]


def _representation(trained: "Trained", open_base: Variant, notes: list[str]) -> RepresentationAnalysis:
    examples = sorted(_examples(trained), key=lambda item: len(item.input_ids))
    collate = Collator(pad_token(trained.tokenizer))
    groups = [examples[begin : begin + AT_ONCE] for begin in range(0, len(examples), AT_ONCE)]
    batches = [_batch(collate(group), trained.task, -(-TOKENS * len(group) // len(examples))) for group in groups]
    tuned = grams(trained.model, batches)
    with open_base() as base:
        untuned = grams(base, batches)
    layers = []
    for part, of_tuned in tuned.items():
        tokens = len(of_tuned[0])
        if tokens < FEWEST:
            notes.append(f"There are too few tokens in the examples to compare the {part}'s hidden states.")
            continue
        for layer, (k, l) in enumerate(zip(untuned[part], of_tuned, strict=True)):  # noqa: E741
            if math.isfinite(value := cka(k, l)):
                layers.append(LayerSimilarity(part=part, layer=layer, cka=round(value, 5)))
    return RepresentationAnalysis(layers=layers, examples=len(examples), tokens=len(tuned["decoder"][0]))


def _batch(inputs: dict[str, torch.Tensor], task: str, per_batch: int) -> Batch:
    """Cut the inputs to LONGEST tokens and choose the tokens to compare. The packing of examples does not matter
    here."""
    return choose({name: value[:, :LONGEST] for name, value in inputs.items()}, task, per_batch)


def _latency(trained: "Trained", open_base: Variant, notes: list[str]) -> LatencyAnalysis | None:
    model = trained.model
    prompt = max((item.input_ids for item in _examples(trained)), key=len)[:PROMPT]
    variants: dict[str, Variant] = {"base": open_base, "tuned": lambda: nullcontext(model)}
    if trained.method == "lora":  # not qlora: a merge rounds the 4-bit weights again, so its result is not useful
        variants["merged"] = lambda: merged(model)
    found = measure_latency(variants, prompt, pad_token(trained.tokenizer), LATENCY_SECONDS)
    if found is None:
        notes.append("Latency was not measured: the model is too slow on this machine.")
    return found
