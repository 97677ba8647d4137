"""The scores of a report: its metrics grouped by suite, with their baselines, and whether higher or lower is better."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from graft.report import intervals, wording
from graft.report.document import Precision, Report
from graft.report.intervals import Interval

Role = Literal["task", "forgetting"]
OURS = "adapter"
BASELINES = {"current": "current version", "fewShot": "few-shot", "base": "base model"}
SHARES = frozenset(
    {"exactMatch", "f1", "rouge1", "rouge2", "rougeL", "accuracy", "toolCallAccuracy", "acc", "acc_norm", "exact_match"}
)
HELD_OUT = "held out"


@dataclass(frozen=True)
class Score:
    """One metric of one suite, for the version and the baselines it was compared with."""

    suite: str  # HELD_OUT for the dataset's own held-out examples
    metric: str
    values: dict[str, float]  # adapter, base, fewShot, current
    precision: dict[str, Precision] = field(default_factory=dict)  # by subject; empty in reports of an older Graft

    @property
    def name(self) -> str:
        return self.metric if self.suite == HELD_OUT else f"{self.suite}/{self.metric}"

    @property
    def share(self) -> bool:
        """Whether the value is a share from 0 to 1."""
        return self.metric in SHARES

    @property
    def lower_is_better(self) -> bool:
        return "loss" in self.metric.lower() or "perplexity" in self.metric.lower()

    def words(self, subject: str) -> str:
        """Return the value of one subject as text, a share in percent."""
        return self._text(self.values.get(subject))

    def interval(self, subject: str) -> Interval | None:
        """Return the interval of one subject's value, with a confidence of 95 %."""
        value, precision = self.values.get(subject), self.precision.get(subject)
        if value is None or precision is None:
            return None
        return intervals.interval(self.metric, value, precision, share=self.share)

    def interval_words(self, subject: str) -> str:
        """Return that interval as text, "" if it is not known."""
        found = self.interval(subject)
        if found is None:
            return ""
        low, high = map(self._text, found)
        return f"{low.removesuffix(' %')} to {high}"

    @property
    def n(self) -> int | None:
        """The number of tasks that the version's value is a mean over."""
        found = self.precision.get(OURS)
        return found.n if found is not None and found.n else None

    def _text(self, value: float | None) -> str:
        return wording.share(value) if self.share else wording.number(value)

    @property
    def verdict(self) -> str:
        """The gain as text: better, worse or equal, and by how much."""
        if self.gain is None:
            return wording.ABSENT
        if self.gain == 0:
            return "equal"
        much = f"{100 * abs(self.gain):.3g} points" if self.share else wording.number(abs(self.gain))
        return f"{much} {'better' if self.gain > 0 else 'worse'}"

    @property
    def ours(self) -> float | None:
        return self.values.get(OURS)

    @property
    def gain(self) -> float | None:
        """How much better than the base model, in the metric's unit; negative is worse."""
        if self.ours is None or "base" not in self.values:
            return None
        return (self.values["base"] - self.ours) if self.lower_is_better else (self.ours - self.values["base"])


def scores_of(report: Report, role: Role = "task") -> list[Score]:
    """Return the scores of the suites of a role, in the order of the metrics.

    Two metrics are left out: the training loss, which is not a score, and forgetting/<suite>, which is the difference
    of two scores.
    """
    forgetting = {suite.name for suite in report.evaluation.suites if suite.role == "forgetting"}
    found: dict[tuple[str, str], dict[str, float]] = {}
    precision: dict[tuple[str, str], dict[str, Precision]] = {}
    for published, value in report.metrics.items():
        name = published
        who, _, rest = name.partition("/")
        subject, name = (who, rest) if who in BASELINES and rest else (OURS, name)
        suite, _, metric = name.rpartition("/")
        if metric != "trainLoss" and suite != "forgetting":
            found.setdefault((suite or HELD_OUT, metric), {})[subject] = value
            if (known := report.precision.get(published)) is not None:
                precision.setdefault((suite or HELD_OUT, metric), {})[subject] = known
    return [
        Score(suite, metric, values, precision.get((suite, metric), {}))
        for (suite, metric), values in found.items()
        if (suite in forgetting) == (role == "forgetting")
    ]


def subjects_of(scores: Sequence[Score]) -> dict[str, str]:
    """Return the subjects that were measured, key -> name.

    The version is last, because it is compared with the other subjects.
    """
    seen = {subject for score in scores for subject in score.values}
    known = {"base": BASELINES["base"], "fewShot": BASELINES["fewShot"], "current": BASELINES["current"]}
    return {key: name for key, name in known.items() if key in seen} | ({OURS: "this version"} if OURS in seen else {})


def headline(scores: Sequence[Score]) -> Score | None:
    """Return the main score of the version. Shares come before others, then held-out examples, then exact match.

    A share that is 0 for every subject comes last: it does not fit the task, such as exact match for long answers.
    """
    ranked = sorted(
        (score for score in scores if score.ours is not None),
        key=lambda score: (
            score.share and not any(score.values.values()),
            not score.share,
            score.suite != HELD_OUT,
            score.metric != "exactMatch",
        ),
    )
    return ranked[0] if ranked else None
