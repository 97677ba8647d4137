"""The loss of a set of tokens, in nats: per example, as a mean over one process, and as a mean over all ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from graft_trainer.data.data_order import blank
from graft_trainer.data.tokens import IGNORED, Collator, Tokenised
from graft_trainer.model import sharding
from graft_trainer.model.batches import Steps, in_batches
from graft_trainer.processes import distributed


def log_likelihoods(
    model: Any, examples: Sequence[Tokenised], pad: int, batch: int, meter: Steps | None = None
) -> list[tuple[float, int]]:
    """Return (sum of the log-likelihoods in nats, number of tokens) per example, over the tokens that the loss covers.

    Examples of similar length share a batch of at most `batch` examples, because padding costs time.
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
    # Only the logits of tokens that the loss covers are converted to 32 bits, because a vocabulary is large.
    losses = cross_entropy(logits[learned].float(), labels[learned], reduction="none")
    sums = torch.zeros(len(labels), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, learned.nonzero()[:, 0], losses.double())
    return [-value for value in sums.tolist()]


def mean_loss(model: Any, examples: Sequence[Tokenised], pad: int, batch: int, meter: Steps | None = None) -> float:
    """Return the cross entropy over all tokens that the loss covers, in nats per token."""
    return loss_of(log_likelihoods(model, examples, pad, batch, meter))[0]


def loss_of(found: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Return the cross entropy in nats per token, and its standard error, None for fewer than two examples.

    `found`: log_likelihoods(). Examples are independent, the tokens of one are not. So the error is that of a ratio of two
    sums over the examples (Cochran 1977, 2.11).
    """
    tokens = max(1, sum(count for _, count in found))
    loss = -sum(value for value, _ in found) / tokens
    if len(found) < 2:
        return loss, None
    squares = sum((-value - loss * count) ** 2 for value, count in found)
    return loss, math.sqrt(squares * len(found) / (len(found) - 1)) / tokens


def shared_loss(model: Any, examples: Sequence[Tokenised], pad: int, batch: int, go_on: Callable[[], None]) -> float:
    """Return mean_loss() of all ranks: each rank measures a part of the examples.

    Sharded weights require that every rank runs the model equally often. inference_mode is not used, because fsdp could
    not train with its tensors afterwards. `go_on` is called before each round of batches.
    """
    collate, training = Collator(pad), model.training
    world, rank = distributed.world_size(), distributed.rank()
    ordered = sorted(examples, key=lambda item: item.tokens)
    device = next(model.parameters()).device
    sums = [0.0, 0.0]
    model.eval()
    try:
        with torch.no_grad():
            for begin in range(0, len(ordered), batch * world):
                go_on()
                mine = ordered[begin + rank * batch : begin + (rank + 1) * batch]
                inputs = collate(mine) if mine else blank(ordered, collate)
                loss = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False).loss
                if mine:
                    learned = sum(item.learned for item in mine)
                    sums = [sums[0] + float(loss) * learned, sums[1] + learned]
    finally:
        model.train(training)
        sharding.reshard(model)
    total, count = distributed.total_float(sums)
    return total / max(1.0, count)
