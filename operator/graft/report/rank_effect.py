"""The effect of the rank of a low-rank update: runs of one method with different ranks, sorted by rank."""

import statistics
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from graft.report import charts, update, wording
from graft.report.compare import Comparison

LOW_RANK = ("lora", "qlora")


@dataclass(frozen=True)
class RankRun:
    """A run with its rank and its results."""

    method: str
    label: str
    rank: int
    trained_share: float | None
    loss: float | None  # on the held-out examples, nats per token
    score: str  # the task score of the matrix
    effective_rank: float | None  # of the update: the median over the kinds of matrices


def rank_runs(comparison: Comparison) -> list[RankRun]:
    """Return the runs of every method with at least two different ranks, sorted by method and rank (PURE)."""
    task = next(row for row in comparison.rows if row.name == "task score")
    found = []
    for label, report, cell in zip(comparison.labels, comparison.reports, task.cells, strict=True):
        rank = report.hyperparameters.get("rank")
        if report.method not in LOW_RANK or not isinstance(rank, int):
            continue
        kinds = update.summaries(report.analysis.update) if report.analysis and report.analysis.update else []
        found.append(
            RankRun(
                method=report.method,
                label=label,
                rank=rank,
                trained_share=report.trainable_share,
                loss=report.metrics.get("evalLoss"),
                score=cell.text,
                effective_rank=statistics.median(kind.effective_rank for kind in kinds) if kinds else None,
            )
        )
    found.sort(key=lambda run: (run.method, run.rank))
    several = {method for method, runs in groupby(found, lambda run: run.method) if len({run.rank for run in runs}) > 1}
    return [run for run in found if run.method in several]


def rank_rows(runs: list[RankRun]) -> list[tuple[str, str, str, str, str]]:
    """Return (label, trained share, loss, task score, effective rank) of each run as texts."""
    return [
        (
            run.label,
            wording.share(run.trained_share),
            wording.ABSENT if run.loss is None else f"{run.loss:.4f}",
            run.score,
            wording.ABSENT if run.effective_rank is None else f"{run.effective_rank:.1f} of {run.rank}",
        )
        for run in runs
    ]


def rank_loss_figure(runs: list[RankRun]) -> Markup | None:
    """Draw the held-out loss over the rank, with one line per method."""
    series: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if run.loss is not None:
            series.setdefault(wording.method(run.method), []).append((float(run.rank), run.loss))
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    return charts.lines(series, title="Held-out loss by rank", x="rank", y="held-out loss (nats per token)")
