"""Render a comparison as a page and as JSON."""

import statistics
from typing import Any

from markupsafe import Markup

from graft.report import charts, update, wording
from graft.report.compare import Comparison, common_scores
from graft.report.job import loss_curves, page
from graft.report.rank_effect import rank_loss_figure, rank_rows, rank_runs
from graft.report.svg import COLOURS

HELD_OUT = ", held out"
SIGNATURE = "Written by graft compare."


def render_comparison(comparison: Comparison) -> str:
    """Return the self-contained page."""
    by_rank = rank_runs(comparison)
    return page(
        "compare.html",
        title="Comparison of " + ", ".join(comparison.labels),
        it=comparison,
        signature=SIGNATURE,
        headers=list(zip(comparison.labels, comparison.reports, strict=True)),
        relative=relative_figure(comparison),
        loss=loss_figure(comparison),
        score_figure=score_figure(comparison),
        scores=common_scores(comparison.reports),
        by_rank=rank_rows(by_rank),
        by_rank_figure=rank_loss_figure(by_rank),
        ranks=rank_figure(comparison),
        updates=updates(comparison),
        similarity=similarity_figure(comparison),
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the matrix for programs. Values are in bytes, seconds and shares."""
    return {
        "reference": comparison.labels[comparison.reference],
        "runs": [
            {
                "label": label,
                "job": f"{report.job.namespace}/{report.job.name}",
                "adapter": report.adapter,
                "version": report.version,
                "method": report.method,
                "rejected": report.evaluation.rejected,
            }
            for label, report in zip(comparison.labels, comparison.reports, strict=True)
        ],
        "rows": [
            {
                "name": row.name,
                "meaning": row.meaning,
                "cells": [
                    {"text": cell.text, "value": cell.value, "relative": cell.relative, "published": figure or None}
                    for cell, figure in zip(row.cells, row.published, strict=True)
                ],
            }
            for row in comparison.rows
        ],
        "ranks": [
            {
                "label": run.label,
                "rank": run.rank,
                "trainedShare": run.trained_share,
                "evalLoss": run.loss,
                "effectiveRank": run.effective_rank,
            }
            for run in rank_runs(comparison)
        ],
        "notes": comparison.notes,
    }


def colours(comparison: Comparison) -> dict[str, str]:
    """Return a colour per run, the same in every figure."""
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(comparison.labels)}


def relative_figure(comparison: Comparison) -> Markup | None:
    """Draw memory, time, latency and size relative to the reference run."""
    rows = [row for row in comparison.rows if row.name not in ("trained share", "task score")]
    rows = [row for row in rows if any(cell.relative is not None for cell in row.cells)]
    if not rows:
        return None
    series = {label: [row.cells[index].relative for row in rows] for index, label in enumerate(comparison.labels)}
    known = [value for values in series.values() for value in values if value]
    log = max(known) > 20 * min(known)  # one outlier would flatten all others
    title = f"Cost relative to {comparison.labels[comparison.reference]}"
    return charts.bars(
        [row.name for row in rows],
        series,
        title=title,
        x="ratio, logarithmic scale; lower is better" if log else "ratio; lower is better",
        log=log,
        words=wording.ratio,
        colours=colours(comparison),
    )


def loss_figure(comparison: Comparison) -> Markup | None:
    series, tints = {}, {}
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        for name, points in loss_curves(report).items():
            key = label if name == "training" else label + HELD_OUT
            series[key], tints[key] = points, colours(comparison)[label]
    if not series:
        return None
    dashed = [name for name in series if name.endswith(HELD_OUT)]
    return charts.lines(
        series, title="Loss over the steps", x="step", y="loss (nats per token)", dashed=dashed, colours=tints
    )


def score_figure(comparison: Comparison) -> Markup | None:
    shared = [found for found in common_scores(comparison.reports) if found[0].share]
    if not shared:
        return None
    series = {label: [found[index].ours for found in shared] for index, label in enumerate(comparison.labels)}
    names = [found[0].name for found in shared]
    return charts.bars(names, series, title="Scores", x="higher is better", share=True, colours=colours(comparison))


def rank_figure(comparison: Comparison) -> Markup | None:
    """Draw the effective rank of the update per layer: the median over the layer's matrices."""
    series = {}
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        layers: dict[int, list[float]] = {}
        for matrix in report.analysis.update.matrices if report.analysis and report.analysis.update else ():
            if matrix.layer is not None:
                layers.setdefault(matrix.layer, []).append(matrix.effective_rank)
        if layers:
            series[label] = [(layer, statistics.median(ranks)) for layer, ranks in sorted(layers.items())]
    if not series:
        return None
    return charts.lines(
        series,
        title="Effective rank of the update by layer",
        x="layer",
        y="effective rank",
        colours=colours(comparison),
        log=True,
    )


def similarity_figure(comparison: Comparison) -> Markup | None:
    series = {}
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        found = report.analysis.representation if report.analysis else None
        points = [(float(item.layer), item.cka) for item in found.layers if item.part == "decoder"] if found else []
        if points:
            series[label] = points
    if not series:
        return None
    title = "Linear CKA of base and tuned hidden states by layer"
    return charts.lines(
        series, title=title, x="layer (0: embeddings)", y="linear CKA", colours=colours(comparison), top=1.0
    )


def updates(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Return (label, effective rank, size of the update, lowest CKA) of each run as texts."""
    rows = []
    for label, report in zip(comparison.labels, comparison.reports, strict=True):
        analysis = report.analysis
        kinds = update.summaries(analysis.update) if analysis and analysis.update else []
        layers = analysis.representation.layers if analysis and analysis.representation else []
        norms = [kind.relative_norm for kind in kinds if kind.relative_norm is not None]
        rows.append(
            (
                label,
                f"{statistics.median(kind.effective_rank for kind in kinds):.1f}" if kinds else wording.ABSENT,
                wording.share(statistics.median(norms)) if norms else wording.ABSENT,
                f"{min(layer.cka for layer in layers):.3f}" if layers else wording.ABSENT,
            )
        )
    return rows
