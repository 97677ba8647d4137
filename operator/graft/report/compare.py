"""Compare several reports (PURE): memory, time, latency, size and score side by side, with published figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

from graft.report import scores, wording
from graft.report.document import Report


@dataclass(frozen=True)
class Cell:
    """One measurement of one run."""

    text: str = wording.ABSENT
    value: float | None = None
    relative: float | None = None  # ratio to the reference run's value


@dataclass(frozen=True)
class Row:
    """One row of the matrix, with a cell per run."""

    name: str
    meaning: str
    cells: list[Cell]
    published: list[str]  # published figures for the run's method; "" if there is none


@dataclass(frozen=True)
class Comparison:
    """The matrix, and notes about the limits of the comparison."""

    reports: list[Report]
    labels: list[str]  # of the runs, unique
    reference: int  # index of the run that the ratios are relative to
    rows: list[Row]
    notes: list[str]


# Figures that are often quoted for models of 7B parameters (70B where stated). They are shown beside the measured
# values.
PUBLISHED: dict[str, dict[str, str]] = {
    "training memory": {
        "full": "over 40 GB (7B)",
        "lora": "14 GB (7B)",
        "qlora": "8 GB (70B)",
        "promptTuning": "10 GB (7B)",
    },
    "training time": {"full": "1× (reference)", "lora": "1.1×", "qlora": "1.5×", "promptTuning": "0.8×"},
    "inference latency": {
        "full": "1× (reference)",
        "lora": "1.05× (unmerged)",
        "qlora": "1.2×",
        "promptTuning": "1.1×",
    },
    "deployment size": {
        "full": "13 GB (7B)",
        "lora": "13 GB + 30 MB (7B)",
        "qlora": "4 GB + 50 MB (7B)",
        "promptTuning": "13 GB + 5 MB (7B)",
    },
    "trained share": {"full": "below 0.01 %", "lora": "0.1–1 %", "qlora": "0.1–1 %", "promptTuning": "0.001 %"},
    "task score": {"full": "100 % (reference)", "lora": "95–99 %", "qlora": "92–97 %", "promptTuning": "90–95 %"},
}
QLORA_LATENCY_NOTE = (
    "The latency of qlora is relative to the base model in 16 or 32 bits, which other runs measured. If the machine was busier "
    "during one of these measurements, the ratio is not reliable."
)
FULL_SHARE_NOTE = (
    "The published share of full fine-tuning, below 0.01 %, cannot be the share of trained parameters: that is 100 % by "
    "definition. The figure is shown as it was published."
)


def compare(reports: Sequence[Report]) -> Comparison:
    """Compare the reports. Raises ValueError if there are fewer than two."""
    if len(reports) < 2:
        raise ValueError("a comparison needs at least two reports")
    reports = list(reports)
    methods = [report.method for report in reports]
    reference = methods.index("full") if "full" in methods else 0
    notes = differences(reports)
    rows = [
        _row("training memory", "peak of one GPU, or of the process", reports, reference, _memory),
        _row("training time", "excluding loading and evaluation", reports, reference, _time),
        _latency_row(reports, notes),
        _row("deployment size", "base model + published weights", reports, reference, _size),
        _row("trained share", "of all parameters", reports, reference, _share),
        _score_row(reports, reference, notes),
    ]
    if "full" in methods:
        notes.append(FULL_SHARE_NOTE)
    return Comparison(reports, labels_of(reports), reference, rows, list(dict.fromkeys(notes)))


def labels_of(reports: Sequence[Report]) -> list[str]:
    """Return unique labels: the method's name with the rank; if that is not unique, also the job's name, then the
    version."""
    names = [_method(report) for report in reports]
    for more in ([report.job.name for report in reports], [report.version for report in reports]):
        seen = Counter(names)
        names = [f"{name}, {one}" if seen[name] > 1 else name for name, one in zip(names, more, strict=True)]
    seen = Counter(names)
    return [f"{name} ({index})" if seen[name] > 1 else name for index, name in enumerate(names, start=1)]


def _method(report: Report) -> str:
    rank = report.hyperparameters.get("rank")
    return wording.method(report.method) + (f" r={rank}" if rank and report.method in ("lora", "qlora") else "")


def differences(reports: Sequence[Report]) -> list[str]:
    """Return a warning if the runs differ in more than the method: then their numbers do not compare the methods alone."""
    aspects: dict[str, Callable[[Report], object]] = {
        "base models": lambda report: report.base_model.digest or report.base_model.uri,
        "training data": lambda report: report.dataset.digests.get("train"),
        "held-out data": lambda report: report.dataset.digests.get("eval"),
        "numbers of steps": lambda report: report.hyperparameters.get("maxSteps"),
        "batch sizes": effective_batch,
        "devices": lambda report: (report.environment.device, report.environment.world_size),
    }
    found = [name for name, aspect in aspects.items() if len({repr(aspect(report)) for report in reports}) > 1]
    return [f"The runs differ in their {', '.join(found)}. Compare them with care."] if found else []


def effective_batch(report: Report) -> int:
    """Return the number of examples per optimizer step."""
    names = ("perDeviceTrainBatchSize", "gradientAccumulationSteps", "worldSize")
    return prod(int(report.hyperparameters.get(name) or 1) for name in names)


def _row(
    name: str,
    meaning: str,
    reports: Sequence[Report],
    reference: int,
    measure: Callable[[Report], tuple[float | None, str]],
) -> Row:
    measured = [measure(report) for report in reports]
    against = measured[reference][0]
    cells = [Cell(text, value, value / against if value and against else None) for value, text in measured]
    return Row(name, meaning, cells, published(name, reports))


def published(row: str, reports: Sequence[Report]) -> list[str]:
    """Return the published figures for each run's method."""
    return [PUBLISHED[row].get(report.method, "") for report in reports]


def _memory(report: Report) -> tuple[float | None, str]:
    return report.resources.peak_memory_bytes, wording.size(report.resources.peak_memory_bytes)


def _time(report: Report) -> tuple[float | None, str]:
    seconds = report.seconds.get("train")
    return seconds, wording.duration(seconds)


def _share(report: Report) -> tuple[float | None, str]:
    return report.trainable_share, wording.share(report.trainable_share)


def _size(report: Report) -> tuple[float | None, str]:
    own = report.resources.published_bytes
    if own is None or report.method == "full":
        return own, wording.size(own)
    base = report.resources.quantized_bytes or report.resources.base_bytes
    if base is None:
        return None, f"? + {wording.size(own)}"
    return base + own, f"{wording.size(base)} + {wording.size(own)}"


def _latency_row(reports: Sequence[Report], notes: list[str]) -> Row:
    """Return the row with the time per token, relative to the base model as it is stored.

    Each run measured its base model and its version alternately, so other load on the machine cancels out. qlora
    measured its base model in 4 bits, so it is compared with the median of the base models of the other runs.
    """
    plain = [base for report in reports if report.method != "qlora" and (base := _per_token(report, "base"))]
    cells = []
    for report in reports:
        tuned, merged, base = (_per_token(report, name) for name in ("tuned", "merged", "base"))
        if report.method == "qlora":
            base = median(plain) if plain else None
            if tuned:
                notes.append(
                    QLORA_LATENCY_NOTE if base else "The latency of qlora needs a run of another method for comparison."
                )
        if tuned is None or base is None:
            cells.append(Cell())
            continue
        text = wording.ratio(tuned / base) + (f" (merged {wording.ratio(merged / base)})" if merged else "")
        cells.append(Cell(text, tuned, tuned / base))
    return Row(
        "inference latency", "per token, relative to the base model", cells, published("inference latency", reports)
    )


def _per_token(report: Report, variant: str) -> float | None:
    latency = report.analysis.latency if report.analysis else None
    found = latency.variants.get(variant) if latency else None
    return found.seconds_per_token if found else None


def common_scores(reports: Sequence[Report]) -> list[list[scores.Score]]:
    """Return the scores that every run has: one list per metric, in the order of the reports."""
    by_name = [
        {score.name: score for score in scores.scores_of(report) if score.ours is not None} for report in reports
    ]
    return [[names[name] for names in by_name] for name in by_name[0] if all(name in names for names in by_name)]


def _score_row(reports: Sequence[Report], reference: int, notes: list[str]) -> Row:
    shared = common_scores(reports)
    main = scores.headline([found[reference] for found in shared])
    if main is None:
        notes.append("The runs have no score in common.")
        return Row("task score", "no score in common", [Cell() for _ in reports], published("task score", reports))
    found = next(group for group in shared if group[reference].name == main.name)
    cells = []
    for score in found:
        value, against = score.ours, main.ours
        relative = None
        above, below = (against, value) if score.lower_is_better else (value, against)
        if above is not None and below:
            relative = above / below
        cells.append(Cell(score.words(scores.OURS), value, relative))
    return Row("task score", main.name, cells, published("task score", reports))
