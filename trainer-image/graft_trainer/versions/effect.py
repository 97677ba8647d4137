"""Measure what an adapter changes in the answers of its base model. The manifest records it for the servers."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from graft.artifacts.effect import KEPT, TOP, prompts
from graft.artifacts.manifest import Effect, EffectPrompt
from safetensors import safe_open

from graft_trainer.data.tokens import Task
from graft_trainer.train import Trained

log = logging.getLogger(__name__)
DIGITS = 5  # decimal digits of a recorded log-probability
LOWEST = -1000.0  # nats. JSON has no infinity


def measure_effect(trained: Trained) -> Effect | None:
    """Return the log-probabilities of next tokens with and without the adapter. None for a whole model."""
    if trained.method == "full":
        return None
    effect = effect_of(trained.model, trained.base_model, trained.task, special_tokens(trained.tokenizer))
    log.info("effect on the next token: %.3f nats", max(map(size, effect.prompts)))
    return effect


def effect_of(
    model: Any, open_base: Callable[[], AbstractContextManager[Any]], task: Task, special: frozenset[int]
) -> Effect:
    """Measure peft's model. The prompts with the largest effect are recorded. `special`: ids of special tokens."""
    asked = prompts(*_vocabulary(model.config), avoid=special)
    with torch.inference_mode():
        adapter = _next_tokens(model, task, asked)
        with open_base() as base_model:
            base = _next_tokens(base_model, task, asked)
    measured = [_recorded(ids, *rows) for ids, *rows in zip(asked, base, adapter, strict=True)]
    return Effect(prompts=sorted(measured, key=size, reverse=True)[:KEPT])


def expected_effect(config: Any, weights: Path) -> Effect | None:
    """Return the record of an adapter that is not measured: a server only checks that there is an effect.

    None if the adapter changes nothing. `config`: of the base model. `weights`: the adapter's safetensors file.
    """
    if not _changes(weights):
        return None
    return Effect(prompts=[EffectPrompt(prompt=ids) for ids in prompts(*_vocabulary(config))[:KEPT]])


def _changes(weights: Path) -> bool:
    """Return whether an adapter can change anything: an update is the product of two matrices, and B starts as 0."""
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        later = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
        return not later or any(bool(file.get_tensor(name).any()) for name in later)


def size(prompt: EffectPrompt) -> float:
    """Return the root mean square of the change of the log-probabilities, in nats."""
    changes = [with_it - without for with_it, without in zip(prompt.adapter, prompt.base, strict=True)]
    return math.sqrt(sum(change * change for change in changes) / max(1, len(changes)))


def _vocabulary(config: Any) -> tuple[int, int | None]:
    """Return the number of tokens, and the token that begins a text. Wrapped models have a config of their text."""
    text = config.get_text_config(decoder=True)
    first = getattr(text, "bos_token_id", None)
    return int(text.vocab_size), first if isinstance(first, int) else None


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens, such as the place of an image."""
    return frozenset(tokenizer.all_special_ids) | frozenset(getattr(tokenizer, "added_tokens_decoder", {}))


def _next_tokens(model: Any, task: Task, asked: list[list[int]]) -> torch.Tensor:
    """Return log-probabilities [prompts, vocabulary] of the next token. All prompts have the same length."""
    ids = torch.tensor(asked, device=model.device)
    more = {}
    if task == "seq2seq":
        start = model.config.decoder_start_token_id
        more = {"decoder_input_ids": torch.full((len(asked), 1), start, device=model.device)}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[:, -1]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _recorded(ids: list[int], base: torch.Tensor, adapter: torch.Tensor) -> EffectPrompt:
    count = min(TOP, len(base))
    tokens = list(dict.fromkeys([*base.topk(count).indices.tolist(), *adapter.topk(count).indices.tolist()]))
    values = [[max(LOWEST, round(float(row[token]), DIGITS)) for token in tokens] for row in (base, adapter)]
    return EffectPrompt(prompt=ids, tokens=tokens, base=values[0], adapter=values[1])
