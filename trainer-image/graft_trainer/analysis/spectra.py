"""Describe the update of each matrix: its singular values, effective rank and size.

For LoRA the dense update B A is never computed. With the QR decompositions B = Q1 R1 and A^T = Q2 R2, its singular
values are those of the small matrix R1 R2^T. For full fine-tuning the update is the dense difference. For large
matrices only the leading singular values are computed, with random projections (Halko et al. 2011, torch.svd_lowrank).
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graft.report.document import MatrixUpdate, UpdateAnalysis
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

MATRICES = 96  # analysed in a full fine-tuning; if the model has more, they are evenly spread over it
EXACT = 1024  # all singular values are computed if the shorter side of a matrix is at most this
LEADING = 64  # singular values that are computed for larger matrices, and the most that are kept for any matrix
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Spectrum:
    """Singular values, largest first, and the Frobenius norm of the whole matrix."""

    values: torch.Tensor
    norm: float
    complete: bool = True


def low_rank_spectrum(a: torch.Tensor, b: torch.Tensor, scale: float) -> Spectrum:
    """Return the spectrum of scale * B A, for A of r x inputs and B of outputs x r."""
    _, right = torch.linalg.qr(a.detach().float().T)
    _, left = torch.linalg.qr(b.detach().float())
    values = torch.linalg.svdvals(left @ right.T) * abs(scale)
    return Spectrum(values, float(values.square().sum().sqrt()))


def dense_spectrum(matrix: torch.Tensor) -> Spectrum:
    """Return the spectrum of a matrix: all singular values if its shorter side is at most EXACT, else the LEADING
    ones."""
    matrix = matrix.detach().float()
    norm = float(torch.linalg.matrix_norm(matrix))
    if min(matrix.shape) <= EXACT:
        return Spectrum(torch.linalg.svdvals(matrix), norm)
    # The fixed seed makes the report reproducible. The global generator keeps its state.
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        _, values, _ = torch.svd_lowrank(matrix, q=LEADING + 8, niter=2)
    return Spectrum(values[:LEADING], norm, complete=False)


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy & Vetterli 2007): 0 for no update, r for r equal
    ones."""
    positive = values[values > 0].double()
    if not len(positive):
        return 0.0
    share = positive / positive.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def update_of(model: Any, base: Any, method: str, stop_at: float) -> UpdateAnalysis:
    """Return the update of each trained matrix. `base` is the untuned model; only the method full reads it.

    At `stop_at` (time.monotonic) it stops and returns the matrices that are analysed by then.
    """
    if method == "promptTuning":
        return _soft_prompt(model)
    if method == "full":
        found, total = _dense_updates(model, base, stop_at)
        return _analysis(found, total, None)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return _analysis(_low_rank_updates(layers, stop_at), len(layers), _rank(layers))


def _analysis(
    found: Iterator[tuple[str, Sequence[int], Spectrum, float]], total: int, rank: int | None
) -> UpdateAnalysis:
    updates = list(found)
    kinds = kinds_of([name for name, *_ in updates])
    return UpdateAnalysis(
        matrices=[
            _matrix(name, *kinds[name], shape, spectrum, base_norm) for name, shape, spectrum, base_norm in updates
        ],
        total=total,
        rank=rank,
    )


def _matrix(
    name: str, kind: str, layer: int | None, shape: Sequence[int], spectrum: Spectrum, base_norm: float
) -> MatrixUpdate:
    values = spectrum.values.cpu()
    return MatrixUpdate(
        name=name,
        kind=kind,
        layer=layer,
        shape=list(shape),
        singular_values=[_short(float(value)) for value in values[:LEADING]],
        norm=_short(spectrum.norm),
        relative_norm=_short(spectrum.norm / base_norm) if base_norm else None,
        effective_rank=round(effective_rank(values), 3),
        exact=spectrum.complete,
    )


def _low_rank_updates(
    layers: dict[str, LoraLayer], stop_at: float
) -> Iterator[tuple[str, Sequence[int], Spectrum, float]]:
    for name, module in layers.items():
        if time.monotonic() > stop_at:
            return
        adapter = module.active_adapters[0]
        if adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        else:
            a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        weight = dequantize_module_weight(module.get_base_layer())
        base_norm = float(torch.linalg.matrix_norm(weight.detach().float()))
        yield _plain(name), weight.shape, low_rank_spectrum(a, b, module.scaling[adapter]), base_norm


def _rank(layers: dict[str, LoraLayer]) -> int | None:
    return max((rank for module in layers.values() for rank in module.r.values()), default=None)


def _dense_updates(
    model: Any, base: Any, stop_at: float
) -> tuple[Iterator[tuple[str, Sequence[int], Spectrum, float]], int]:
    before = dict(base.named_parameters())
    names = [name for name, value in model.named_parameters() if value.ndim == 2 and name in before]
    step = max(1.0, len(names) / MATRICES)
    chosen = [names[int(index * step)] for index in range(min(len(names), MATRICES))]
    after = dict(model.named_parameters())

    def updates() -> Iterator[tuple[str, Sequence[int], Spectrum, float]]:
        for name in chosen:
            if time.monotonic() > stop_at:
                return
            tuned = after[name].detach().float()
            original = before[name].detach().to(tuned.device).float()
            norm = float(torch.linalg.matrix_norm(original))
            yield name.removesuffix(".weight"), tuned.shape, dense_spectrum(tuned - original), norm

    return updates(), len(names)


def _soft_prompt(model: Any) -> UpdateAnalysis:
    """Return the spectrum of the prompt itself. relative_norm is the root mean square length of its vectors, divided by
    that of the token embeddings."""
    prompt = next(iter(model.prompt_encoder.values())).embedding.weight.detach().float()
    words = model.get_input_embeddings().weight.detach().float()
    typical = float(words.square().sum(1).mean().sqrt()) * len(prompt) ** 0.5
    spectrum = dense_spectrum(prompt)
    return UpdateAnalysis(matrices=[_matrix("prompt", "prompt", None, prompt.shape, spectrum, typical)], total=1)


def kinds_of(names: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Return each module's kind and the number of its block. The kind is for example q_proj, or encoder.SelfAttention.q
    if q alone would be ambiguous."""
    parts = {name: NUMBER.split(name, maxsplit=1) for name in names}
    places: dict[str, set[str]] = {}
    for name in names:
        places.setdefault(_leaf(name), set()).add(NUMBER.sub("*", name))
    found = {}
    for name in names:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        kind = _leaf(name)
        if len(places[kind]) > 1:
            where = [part for part in name.split(".") if not part.isdigit()]
            kind = ".".join(dict.fromkeys([parts[name][0].partition(".")[0], *where[-2:]]))
        found[name] = (kind, int(number[1]) if number else None)
    return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _short(value: float) -> float:
    """Round to five significant digits, because people read the report too."""
    return float(f"{value:.5g}")
