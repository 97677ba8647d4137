"""Summaries of the update's matrices by kind, for figures and tables (PURE)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from graft.report.document import MatrixUpdate, UpdateAnalysis


@dataclass(frozen=True)
class KindSummary:
    """All matrices of one kind, such as every layer's q_proj."""

    kind: str
    matrices: int
    shape: list[int]
    effective_rank: float  # median
    least_rank: float
    greatest_rank: float
    relative_norm: float | None  # median
    rank_for_90: int | None  # median; None if the known singular values do not reach 90 %
    known: int  # singular values that are known of each matrix
    exact: bool


def energy(matrix: MatrixUpdate) -> list[float]:
    """Return the share of the squared norm in the first 1, 2, … singular values.

    An update of that rank keeps this share (Eckart & Young 1936).
    """
    total, kept, shares = matrix.norm**2, 0.0, []
    for value in matrix.singular_values:
        kept += value**2
        shares.append(min(1.0, kept / total) if total else 1.0)
    return shares


def rank_for(shares: Sequence[float], wanted: float) -> int | None:
    """Return the smallest rank that keeps the share `wanted` of the squared norm, or None."""
    return next((rank for rank, share in enumerate(shares, start=1) if share >= wanted), None)


def by_kind(update: UpdateAnalysis) -> dict[str, list[MatrixUpdate]]:
    """Return the matrices by kind, in the model's order."""
    kinds: dict[str, list[MatrixUpdate]] = {}
    for matrix in update.matrices:
        kinds.setdefault(matrix.kind, []).append(matrix)
    return kinds


def summaries(update: UpdateAnalysis) -> list[KindSummary]:
    """Return one summary per kind."""
    return [_summary(kind, matrices) for kind, matrices in by_kind(update).items()]


def _summary(kind: str, matrices: Sequence[MatrixUpdate]) -> KindSummary:
    ranks = [matrix.effective_rank for matrix in matrices]
    norms = [matrix.relative_norm for matrix in matrices if matrix.relative_norm is not None]
    enough = [rank for matrix in matrices if (rank := rank_for(energy(matrix), 0.9)) is not None]
    return KindSummary(
        kind=kind,
        matrices=len(matrices),
        shape=matrices[0].shape,
        effective_rank=statistics.median(ranks),
        least_rank=min(ranks),
        greatest_rank=max(ranks),
        relative_norm=statistics.median(norms) if norms else None,
        rank_for_90=statistics.median_high(enough) if len(enough) == len(matrices) else None,
        known=min(len(matrix.singular_values) for matrix in matrices),
        exact=all(matrix.exact for matrix in matrices),
    )


def median_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the median at each point, up to the length of the shortest curve."""
    return [statistics.median(values) for values in zip(*curves, strict=False)]


def typical_spectra(update: UpdateAnalysis) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return (singular values divided by the largest, kept energy), the median of each kind.

    Unchanged matrices are left out.
    """
    normalised, kept = {}, {}
    for kind, matrices in by_kind(update).items():
        moved = [matrix for matrix in matrices if matrix.singular_values and matrix.singular_values[0] > 0]
        if moved:
            curves = [[value / matrix.singular_values[0] for value in matrix.singular_values] for matrix in moved]
            normalised[kind] = median_curve(curves)
            kept[kind] = median_curve([energy(matrix) for matrix in moved])
    return normalised, kept
