"""A comparison and a report as text for a terminal (PURE)."""

import textwrap
from collections.abc import Sequence

from graft.report import scores, wording
from graft.report.compare import Cell, Comparison, Row
from graft.report.document import Report

GAP = "  "


def as_text(comparison: Comparison) -> str:
    """Return the matrix with one column per run. The published figures are below each row."""
    lines = [["", *comparison.labels], ["", *(f"{r.adapter} {r.version}" for r in comparison.reports)], []]
    for row in comparison.rows:
        lines.append([row.name, *(_measured(row, cell) for cell in row.cells)])
        lines.append(["  published", *(figure or "-" for figure in row.published)])
    notes = [textwrap.fill(note, 100) for note in comparison.notes]
    head = f"Ratios are relative to {comparison.labels[comparison.reference]}. Latency is per token, relative to the base model."
    return "\n".join([*_aligned(lines), "", head, *notes])


def report_as_text(report: Report) -> str:
    """Return the verdict and the scores of one report, with a column per subject."""
    rejected = report.evaluation.rejected
    head = f"{report.adapter} {report.version}: {wording.method(report.method)} of {report.base_model.name}, "
    head += "rejected by its gates" if rejected else "published"
    head += f"\n{report.digest}" if report.digest else ""
    found = [*scores.scores_of(report), *scores.scores_of(report, "forgetting")]
    subjects = scores.subjects_of(found)
    lines = [["", *subjects.values(), "95 % interval", "n"]]
    for score in found:
        interval = score.interval_words(scores.OURS) or wording.ABSENT
        lines.append([score.name, *map(score.words, subjects), interval, wording.count(score.n)])
    table = _aligned(lines) if found else ["nothing was measured"]
    return "\n".join([head, *(f"  missed: {gate}" for gate in rejected), "", *table])


def _measured(row: Row, cell: Cell) -> str:
    if cell.relative is None or row.name in ("inference latency", "trained share"):
        return cell.text
    relative = f"{100 * cell.relative:.0f} %" if row.name == "task score" else f"{cell.relative:.2f}×"
    return f"{cell.text} ({relative})"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    columns = max(len(line) for line in lines)
    widths = [max((len(line[index]) for line in lines if index < len(line)), default=0) for index in range(columns)]
    return [GAP.join(text.ljust(width) for text, width in zip(line, widths, strict=False)).rstrip() for line in lines]
