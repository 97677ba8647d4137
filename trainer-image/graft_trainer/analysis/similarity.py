"""Measure how much training changed the hidden states: linear CKA of base and tuned model per layer (Kornblith et al.
2019).

It uses the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al. 2021, eq. 3). There are usually fewer tokens
than dimensions here. Then the biased estimator is close to 1 for any two models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graft_trainer.data.tokens import IGNORED

FEWEST = 4  # tokens that the estimator needs

# part of the model -> one Gram matrix (tokens x tokens) per layer, the embeddings first
Grams = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Chosen:
    """The tokens of one batch that are compared for one part of the model. That part's inputs are `width` tokens
    wide."""

    rows: torch.Tensor
    columns: torch.Tensor
    width: int


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the tokens to compare for each part."""

    inputs: dict[str, torch.Tensor]
    chosen: dict[str, Chosen]


def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741 - the papers' names
    """Return the unbiased Hilbert-Schmidt independence criterion of two Gram matrices, n x n with n > 3."""
    n = len(k)
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())  # noqa: E741
    rows_k, rows_l = k.sum(0), l.sum(0)
    cross = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_l) / (n - 2)
    return ((k * l).sum() + cross) / (n * (n - 3))


def cka(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """Return linear CKA from the Gram matrices X X^T and Y Y^T. It is 1 if X and Y are equal up to rotation and scale,
    around 0 if they are unrelated, and nan if X or Y does not vary."""
    both = hsic(k, k) * hsic(l, l)
    return float(hsic(k, l) / both.sqrt()) if both > 0 else float("nan")


def gram(states: torch.Tensor) -> torch.Tensor:
    """Return X X^T of hidden states (tokens x dimensions). They are centred first, because a large mean costs
    precision."""
    states = states.double()
    states = states - states.mean(0)
    return states @ states.T


def choose(inputs: dict[str, torch.Tensor], task: str, per_batch: int) -> Batch:
    """Choose the tokens of a batch to compare: at most `per_batch` for each part, evenly spread.

    The first token of a causal model is left out. It attends only to itself, and models put very large values there
    (attention sinks), which would dominate the result.
    """
    inputs = dict(inputs)
    mask = inputs["attention_mask"].bool()
    if task == "seq2seq":
        parts = {"encoder": mask, "decoder": inputs["labels"] != IGNORED}
    else:
        parts = {"decoder": mask & (mask.cumsum(1) > 1)}
        inputs.pop("labels", None)  # no loss is needed, and it would take memory
    return Batch(inputs, {part: _spread(there, per_batch) for part, there in parts.items()})


def _spread(there: torch.Tensor, most: int) -> Chosen:
    rows, columns = there.nonzero(as_tuple=True)
    keep = torch.linspace(0, len(rows) - 1, min(len(rows), most)).round().long()
    return Chosen(rows[keep], columns[keep], there.shape[1])


def grams(model: Any, batches: Sequence[Batch]) -> Grams:
    """Return the Gram matrices of each layer's hidden states at the chosen tokens."""
    states: dict[str, list[list[torch.Tensor]]] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
                output = model(**inputs, output_hidden_states=True, use_cache=False)
                for part, tokens in batch.chosen.items():
                    layers = _hidden_states(output, part)
                    collected = states.setdefault(part, [[] for _ in layers])
                    for kept, layer in zip(collected, layers, strict=True):
                        # Count the tokens from the end, because a soft prompt stands before them.
                        kept.append(layer[:, -tokens.width :][tokens.rows, tokens.columns].float().cpu())
    finally:
        model.train(training)
    return {part: [gram(torch.cat(kept)) for kept in layers] for part, layers in states.items()}


def _hidden_states(output: Any, part: str) -> Sequence[torch.Tensor]:
    """Return (layers + 1) tensors of batch x tokens x dimensions."""
    found = getattr(output, f"{part}_hidden_states", None)
    states: Sequence[torch.Tensor] = found if found is not None else output.hidden_states
    return states
