"""evaluate: what the adapter is worth on the held-out examples, beside the base model without it.

evalLoss is in nats per learned token. exactMatch is the share of the examples whose greedily generated answer equals
the expected one, case and white space aside.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from graft_trainer.dataset import Example
from graft_trainer.failures import out_of_memory
from graft_trainer.run import Run
from graft_trainer.tokens import IGNORED, Collator, Tokenised, pad_token, prompt_ids

if TYPE_CHECKING:
    from graft_trainer.train import Trained

log = logging.getLogger(__name__)
GENERATED_AT_ONCE = 32  # answers; halved as long as memory runs out
SAMPLES = 5  # answers that the report shows


@dataclass(frozen=True)
class Evaluated:
    """Scores by name, base/… for the base model's, and a few answers to look at."""

    metrics: dict[str, float]
    samples: list[dict[str, str]] = field(default_factory=list)


def evaluate(run: Run, trained: "Trained") -> Evaluated:
    """Measure adapter and base model."""
    started = time.monotonic()
    run.progress.stage("Evaluating", percent=100, eta_seconds=0)
    metrics: dict[str, float] = {}
    samples: list[dict[str, str]] = []
    if trained.train_loss is not None:
        metrics["trainLoss"] = round(trained.train_loss, 5)
    if trained.held_out is not None:
        model, examples = trained.model, trained.held_out.examples
        pad, batch = pad_token(trained.tokenizer), trained.resolved.per_device_train_batch_size
        loss = trained.eval_loss if trained.eval_loss is not None else mean_loss(model, examples, pad, batch)
        with model.disable_adapter():
            base_loss = mean_loss(model, examples, pad, batch)
        metrics |= {"evalLoss": round(loss, 5), "base/evalLoss": round(base_loss, 5)}
        log.info("held-out loss: %.4f, base model %.4f", loss, base_loss)
        run.progress.update(eval_loss=metrics["evalLoss"], metrics=dict(metrics))
        samples = _exact_match(run, trained, metrics)
    run.progress.update(metrics=dict(metrics))
    trained.seconds["evaluate"] = time.monotonic() - started
    return Evaluated(metrics, samples)


def _exact_match(run: Run, trained: "Trained", metrics: dict[str, float]) -> list[dict[str, str]]:
    chosen = [example for example in trained.held_out_examples if example.text is None and example.answer]
    chosen = chosen[: run.job.evaluation.max_samples]
    if not chosen:
        return []
    expected = [example.answer or "" for example in chosen]
    longest = run.job.evaluation.max_new_tokens
    answers = generate(trained, chosen, longest, "adapter")
    with trained.model.disable_adapter():
        base = generate(trained, chosen, longest, "base model")
    metrics["exactMatch"] = exact_match(answers, expected)
    metrics["base/exactMatch"] = exact_match(base, expected)
    log.info(
        "exact match on %d held-out examples: %.4f, base model %.4f",
        len(chosen),
        metrics["exactMatch"],
        metrics["base/exactMatch"],
    )
    return [
        {
            "prompt": example.prompt or str((example.messages or ({}, {}))[-2].get("content", "")),
            "expected": expected[index],
            "answer": answers[index],
            "base/answer": base[index],
        }
        for index, example in enumerate(chosen[:SAMPLES])
    ]


def normalise(answer: str) -> str:
    """Lower case, one space between words."""
    return " ".join(answer.lower().split())


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of the answers that equal what was expected, normalised; four digits."""
    hits = sum(normalise(one) == normalise(other) for one, other in zip(answers, expected, strict=True))
    return round(hits / len(expected), 4)


def mean_loss(model: Any, examples: Sequence[Tokenised], pad: int, batch: int) -> float:
    """Cross entropy over all learned tokens, nats per token. Like lengths share a batch: padding is wasted work."""
    collate, total, count = Collator(pad), 0.0, 0
    ordered = sorted(examples, key=lambda item: len(item.input_ids))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for begin in range(0, len(ordered), batch):
                inputs = {key: value.to(model.device) for key, value in collate(ordered[begin : begin + batch]).items()}
                tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += float(model(**inputs, use_cache=False).loss) * tokens
                count += tokens
    finally:
        model.train(training)
    return total / count


def generate(trained: "Trained", examples: Sequence[Example], max_new_tokens: int, who: str) -> list[str]:
    """Greedy answers, in the order of the examples."""
    tokenizer, model = trained.tokenizer, trained.model
    context = trained.context
    prompts = [prompt_ids(example, tokenizer) for example in examples]
    # An answer that is far longer than the expected one cannot equal it; the base model often does not stop by itself.
    wanted = [len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: len(prompts[index]))
    answers = [""] * len(examples)
    size, done, told = GENERATED_AT_ONCE, 0, time.monotonic()
    stop = stop_tokens(trained)
    model.eval()
    while done < len(order):
        chosen = order[done : done + size]
        new = min(max_new_tokens, 2 * max(wanted[index] for index in chosen) + 8)
        if context is not None:
            new = min(new, max(1, context // 2))
        room = context - new if context is not None else None
        try:
            texts = _generate_batch(trained, [_last(prompts[index], room) for index in chosen], new, stop)
        except Exception as error:
            if not out_of_memory(error) or size == 1:
                raise
            size //= 2
            log.warning("memory ran out while generating, going on with %d answers at once", size)
            torch.cuda.empty_cache()
            continue
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
        done += len(chosen)
        if time.monotonic() - told >= 5 or done == len(order):
            told = time.monotonic()
            log.info("%s: %d of %d answers generated", who, done, len(order))
    return answers


def _generate_batch(trained: "Trained", prompts: list[list[int]], new: int, stop: list[int]) -> list[str]:
    """Answers to prompts of like length, filled up on the left so that all go on from their last token."""
    pad, width = pad_token(trained.tokenizer), max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model = trained.model
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=new, do_sample=False, eos_token_id=stop or None, pad_token_id=pad, use_cache=True
            ),
        )
    return [str(text) for text in trained.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def stop_tokens(trained: "Trained") -> list[int]:
    """The ids that end an answer: the model's, the tokenizer's, and the special token that ends the learned answers."""
    stop: set[int] = set()
    for owner in (trained.model.generation_config, trained.tokenizer):
        value = getattr(owner, "eos_token_id", None)
        stop.update(value if isinstance(value, list) else [value] if value is not None else [])
    special = set(trained.tokenizer.all_special_ids)
    for item in trained.train.examples[:20]:
        learned = [label for label in item.labels if label != IGNORED]
        stop.update(next(([token] for token in reversed(learned[-3:]) if token in special), []))
    return sorted(stop)


def _last(prompt: list[int], room: int | None) -> list[int]:
    return prompt if room is None or len(prompt) <= room else prompt[-room:]
