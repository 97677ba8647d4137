"""Render the report.json of one run as report.html."""

from collections import defaultdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from graft.report import charts, facts, scores, update, wording
from graft.report.document import Analysis, MatrixUpdate, Report
from graft.report.svg import COLOURS

# The sources of the answers in a sample, in the order of the page.
ANSWERS = {
    "answer": "This version",
    "expected": "Expected",
    "base/answer": "Base model",
    "fewShot/answer": "Base model, few-shot",
    "current/answer": "Current version",
}
# A subject has the same colour in every figure of the page.
SUBJECT_COLOURS = {
    "this version": COLOURS[0],
    "current version": COLOURS[3],
    "few-shot": COLOURS[1],
    "base model": COLOURS[5],
}
LOGARITHMIC = 10  # a loss curve whose largest value is this many times its smallest is flat on a linear axis
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
VARIANTS = {"base": "base model", "tuned": "this version", "merged": "this version, merged"}


def render_job(document: dict[str, Any] | Report) -> str:
    """Return the self-contained page of one report.

    Raises pydantic's ValidationError if the document is not a report.
    """
    report = document if isinstance(document, Report) else Report.model_validate(document)
    task, forgetting = scores.scores_of(report), scores.scores_of(report, "forgetting")
    analysis = report.analysis or Analysis()
    return page(
        "job.html",
        title=f"{report.adapter} {report.version}",
        report=report,
        analysis=analysis,
        tiles=facts.tiles(report),
        curves=loss_curves(report),
        loss=loss_figure(report),
        rates=rate_figure(report),
        records=[defaultdict(lambda: None, record) for record in report.loss_curve],
        task=task,
        task_figure=score_figure(task, f"of {report.adapter} {report.version}"),
        forgetting=forgetting,
        forgetting_figure=score_figure(forgetting, "on the forgetting suites"),
        subjects_of=scores.subjects_of,
        time_figure=time_figure(report),
        costs=facts.costs(report),
        summaries=update.summaries(analysis.update) if analysis.update else [],
        spectra=spectra_figure(analysis),
        rank_map=heat_map(analysis, "rank"),
        norm_map=heat_map(analysis, "norm"),
        similarity=similarity_figure(analysis),
        latency=latency_figure(analysis),
        variants=VARIANTS,
        soft_prompt=report.method == "promptTuning",
        answers=ANSWERS,
        hardware=facts.hardware(report),
        dataset=facts.dataset(report),
        provenance=facts.provenance(report),
    )


def page(template: str, **context: Any) -> str:
    """Render a template. All content is escaped, because it comes from data sets and models that are not trusted."""
    environment = Environment(
        loader=PackageLoader("graft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = ("size", "duration", "share", "count", "number", "ratio", "method", "setting")
    environment.filters |= {name: getattr(wording, name) for name in words}
    environment.filters["gate_text"] = facts.gate_text
    return environment.get_template(template).render(**context) + "\n"


def loss_curves(report: Report) -> dict[str, list[tuple[float, float]]]:
    """Return the training loss and the held-out loss over the steps."""
    named = {"training": "loss", "held out": "evalLoss"}
    curves = {
        name: [(record["step"], record[field]) for record in report.loss_curve if field in record and "step" in record]
        for name, field in named.items()
    }
    return {name: points for name, points in curves.items() if points}


def loss_figure(report: Report) -> Markup | None:
    curves = loss_curves(report)
    if not curves:
        return None
    name, points = next(iter(curves.items()))
    first, last = points[0], points[-1]
    title = (
        f"{name.capitalize()} loss from {first[1]:.3g} at step {first[0]:.0f} to {last[1]:.3g} at step {last[0]:.0f}"
    )
    values = [value for series in curves.values() for _, value in series]
    log = min(values) > 0 and max(values) / min(values) > LOGARITHMIC
    y = f"loss (nats per token{', log axis' if log else ''})"
    return charts.lines(curves, title=title, x="step", y=y, dashed=["held out"], log=log)


def rate_figure(report: Report) -> Markup | None:
    """Draw the learning rate and the gradient norm over the steps. Reports of an older Graft have no norm."""
    named = {"learning rate": "learningRate", "gradient norm": "gradNorm"}
    curves = {
        name: [(record["step"], record[field]) for record in report.loss_curve if field in record and "step" in record]
        for name, field in named.items()
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    norms = [value for _, value in curves.get("gradient norm", [])]
    top = f". The largest gradient norm is {max(norms):.3g}" if norms else ""
    return charts.panels(curves, title=f"{' and '.join(curves).capitalize()} by step{top}", x="step")


def score_figure(found: list[scores.Score], whose: str) -> list[Markup]:
    """Draw one figure for scores and one for losses, because their scales differ. The version's bar comes first."""
    figures = []
    for share in (True, False):
        chosen = [score for score in found if score.share is share and not score.metric.lower().endswith("perplexity")]
        if not chosen:
            continue
        who = dict(reversed(scores.subjects_of(chosen).items()))
        series = {name: [score.values.get(key) for score in chosen] for key, name in who.items()}
        spread = {name: [score.interval(key) for score in chosen] for key, name in who.items()}
        title = f"{'Scores' if share else 'Losses'} {whose}"
        x = "higher is better" if share else "lower is better" if all(s.lower_is_better for s in chosen) else ""
        figures.append(
            charts.bars(
                [score.name for score in chosen],
                series,
                title=title,
                x=x,
                share=share,
                colours=SUBJECT_COLOURS,
                intervals=spread,
            )
        )
    return figures


def time_figure(report: Report) -> Markup | None:
    """Draw the time of each stage of the run."""
    if not report.seconds:
        return None
    names = [facts.STAGES.get(name, name) for name in report.seconds]
    longest = max(report.seconds.values())
    unit, length = next(((unit, length) for unit, length in UNITS if longest >= 2 * length), UNITS[-1])
    series = {unit: [value / length for value in report.seconds.values()]}
    return charts.bars(
        names, series, title="Time by stage of the run", x=unit, words=lambda value: wording.duration(value * length)
    )


def spectra_figure(analysis: Analysis) -> Markup | None:
    if analysis.update is None:
        return None
    normalised, energy = update.typical_spectra(analysis.update)
    if not normalised or len(normalised) > 2 * len(COLOURS):
        return None
    return charts.spectra(normalised, energy, title="Singular values of the update, by kind of matrix")


def heat_map(analysis: Analysis, what: str) -> Markup | None:
    """Draw the effective rank or the relative size of the update by kind and layer.

    None if no matrix belongs to a layer.
    """
    found = analysis.update
    matrices = [matrix for matrix in found.matrices if matrix.layer is not None] if found else []
    if not found or not matrices:
        return None

    def value(matrix: MatrixUpdate) -> float | None:
        if what == "rank":
            return matrix.effective_rank
        return 100 * matrix.relative_norm if matrix.relative_norm is not None else None

    cells = {(m.kind, m.layer or 0): number for m in matrices if (number := value(m)) is not None}
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))
    layers = list(range(max(matrix.layer or 0 for matrix in matrices) + 1))
    if what == "rank":
        label = "Effective rank of the update"
        if found.rank:
            label += f" (at most {found.rank})"
        return charts.heat_map(kinds, layers, cells, title=label, label=label, form="{:.1f}", largest=found.rank)
    label = "Size of the update in percent of the size of the weights (Frobenius norms)"
    return charts.heat_map(kinds, layers, cells, title=label, label=label, form="{:.2g}")


def similarity_figure(analysis: Analysis) -> Markup | None:
    found = analysis.representation
    if found is None or not found.layers:
        return None
    parts: dict[str, list[tuple[float, float]]] = {}
    for item in found.layers:
        parts.setdefault(item.part, []).append((item.layer, item.cka))
    lowest = min(found.layers, key=lambda item: item.cka)
    title = (
        f"Linear CKA of base and tuned hidden states by layer; the lowest is {lowest.cka:.3f} at layer {lowest.layer}"
    )
    return charts.lines(parts, title=title, x="layer (0: embeddings)", y="linear CKA", top=1.0)


def latency_figure(analysis: Analysis) -> Markup | None:
    found = analysis.latency
    if found is None:
        return None
    names = list(found.variants)
    values = {"milliseconds": [1000 * found.variants[name].seconds_per_token for name in names]}
    labels = [VARIANTS.get(name, name) for name in names]
    return charts.bars(labels, values, title="Time per generated token", x="milliseconds per token")
