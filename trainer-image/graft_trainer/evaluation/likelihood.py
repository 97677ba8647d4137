"""How likely a model finds given answers, in nats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from graft_trainer.data.dataset import Example
from graft_trainer.data.tokens import IGNORED, Collator, Tokenised, tokenise_one, tokenise_pair
from graft_trainer.evaluation.subject import Steps, Subject, in_batches


def log_likelihoods(
    model: Any, examples: Sequence[Tokenised], pad: int, batch: int, meter: Steps | None = None
) -> list[tuple[float, int]]:
    """(sum of the log-likelihoods of the learned tokens in nats, their number) per example.

    Like lengths share a batch of at most `batch`: padding is wasted work.
    """
    collate = Collator(pad)
    order = sorted(range(len(examples)), key=lambda index: examples[index].tokens)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    training = model.training

    def measure(chosen: Sequence[int]) -> None:
        items = [examples[index] for index in chosen]
        inputs = {key: value.to(model.device) for key, value in collate(items).items()}
        for index, item, value in zip(chosen, items, _sums(model, inputs, items[0].task), strict=True):
            found[index] = (value, item.learned)

    model.eval()
    try:
        with torch.inference_mode():
            in_batches(order, batch, measure, meter)
    finally:
        model.train(training)
    return found


def _sums(model: Any, inputs: dict[str, torch.Tensor], task: str) -> list[float]:
    labels = inputs["labels"]
    if task == "seq2seq":  # the labels are the decoder's, and the model shifts them
        logits = model(**inputs, use_cache=False).logits
    else:
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        # Each position predicts the next one; virtual tokens before the input have logits, too.
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    learned = labels != IGNORED
    # In 32 bits only where it is needed: a vocabulary is large.
    losses = cross_entropy(logits[learned].float(), labels[learned], reduction="none")
    sums = torch.zeros(len(labels), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, learned.nonzero()[:, 0], losses.double())
    return [-value for value in sums.tolist()]


def tokenised(example: Example, subject: Subject, learned: int | None = None) -> Tokenised:
    """The example, cut to what the model takes: of a text all of it is to be predicted, of others the last `learned` of the
    learned tokens, which are those of the last answer when that is None. Answers before are part of the question."""
    room = subject.room
    if subject.task == "seq2seq":
        source, target = tokenise_pair(example, subject.tokenizer)
        return Tokenised(subject.cut(source, room), target[:room], "seq2seq")
    ids, mask = tokenise_one(example, subject.tokenizer)
    if example.text is not None:
        return Tokenised(ids[:room], list(ids[:room]))
    places = [at for at, learn in enumerate(mask) if learn]
    asked = set(places[-(learned or _last_run(places)) :])
    labels = [token if at in asked else IGNORED for at, token in enumerate(ids)]
    return Tokenised(ids, labels) if room is None else Tokenised(ids[-room:], labels[-room:])


def _last_run(places: Sequence[int]) -> int:
    """How many of the ascending numbers at the end follow each other without a gap."""
    run = 1
    while run < len(places) and places[-run - 1] == places[-run] - 1:
        run += 1
    return run
