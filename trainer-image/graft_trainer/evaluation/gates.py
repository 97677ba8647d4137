"""Gates and the measurements that they need (PURE).

This module knows which metrics can exist, which subjects must be measured, and which gates were missed. An adapter's
metric has no prefix. The prefixes are base/ for the base model, fewShot/ for the base model with examples in its
prompt, and current/ for the adapter's newest version. forgetting/<suite> says how much worse the adapter is than the
base model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from graft.api.evaluation import Evaluation, Gate, Metric, Suite
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

Who = Literal["adapter", "base", "fewShot", "current"]
HELD_OUT = ""  # stands for the held-out examples in place of a suite's name
FORGETTING = "forgetting"
RESERVED = ("base", "current", FORGETTING)  # prefixes of metrics, so no suite may have such a name
LOWER_IS_BETTER = ("loss", "evalloss", "trainloss", "perplexity", "bits_per_byte", "brier_score", "ter", "mse", "mae")


def prefixed(who: Who, metric: str) -> str:
    """Return the name under which a metric of `who` is published."""
    return metric if who == "adapter" else f"{who}/{metric}"


def split_name(name: str) -> tuple[Who, str, str]:
    """Split a published name into (subject, suite or HELD_OUT, metric)."""
    who: Who = "adapter"
    others: tuple[Who, ...] = ("base", "fewShot", "current")
    for other in others:
        if name.startswith(f"{other}/"):
            who, name = other, name.removeprefix(f"{other}/")
            break
    suite, slash, metric = name.partition("/")
    return (who, suite, metric) if slash else (who, HELD_OUT, name)


def lower_is_better(name: str) -> bool:
    """Return whether a lower value is better. This holds for losses, perplexities, error measures and forgetting."""
    _, suite, metric = split_name(name)
    return suite == FORGETTING or metric.lower().endswith(LOWER_IS_BETTER)


def gain(name: str, value: float, other: float) -> float:
    """Return how much better `value` is than `other`."""
    return other - value if lower_is_better(name) else value - other


def plan(evaluation: Evaluation, *, has_current: bool = True) -> dict[str, list[Who]]:
    """Return the subjects to measure for each suite (and HELD_OUT), the adapter first.

    A baseline is measured if `baselines` lists it or a gate needs it. A suite with the role forgetting also needs the
    base model. The current version is measured if a gate needs it. fewShot is possible only for the adapter's own task,
    that is for the held-out examples and for JSONL suites with the role task.
    """
    needed = {(who, suite) for gate in evaluation.gates or () for who, suite in _needs(gate)}
    result: dict[str, list[Who]] = {}
    for name, suite in [(HELD_OUT, None), *((suite.name, suite) for suite in evaluation.suites or ())]:
        forgetting = suite is not None and suite.role == "forgetting"
        chosen: list[Who] = ["adapter"]
        if "zeroShot" in evaluation.baselines or forgetting or ("base", name) in needed:
            chosen.append("base")
        if _few_shot_possible(suite) and ("fewShot" in evaluation.baselines or ("fewShot", name) in needed):
            chosen.append("fewShot")
        if has_current and ("current", name) in needed:
            chosen.append("current")
        result[name] = chosen
    return result


def _few_shot_possible(suite: Suite | None) -> bool:
    return suite is None or (suite.lm_eval is None and suite.role == "task")


def _needs(gate: Gate) -> list[tuple[Who, str]]:
    who, suite, _ = split_name(gate.metric)
    return [(who, suite)] + ([(gate.over, suite)] if gate.min_gain is not None else [])


def unknown(evaluation: Evaluation, has_held_out: bool, *, held_out_answers: bool = True) -> Failure | None:
    """Return Failure(ConfigurationInvalid) for the first reserved suite name, else for the first gate on a metric that
    cannot exist, else None. `held_out_answers`: whether the held-out examples have answers; texts have none."""
    for suite in evaluation.suites or ():
        if suite.name in RESERVED:
            return Failure(
                Reason.CONFIGURATION_INVALID,
                f"spec.evaluation.suites: {suite.name} cannot be a suite's name, because {suite.name}/ is the prefix of other metrics",
                "Give the suite another name.",
            )
    held_out = ["trainLoss"]
    if has_held_out:
        answers = ["exactMatch", "toolCallAccuracy"] if held_out_answers and evaluation.max_samples else []
        held_out += ["evalLoss", *answers]
    for gate in evaluation.gates or ():
        if problem := _cannot_be(gate, evaluation, held_out, held_out_answers):
            return Failure(
                Reason.CONFIGURATION_INVALID,
                f"spec.evaluation.gates: {problem}",
                f"The metrics of this job are {', '.join(_names(evaluation, held_out))}.",
            )
    return None


def _cannot_be(gate: Gate, evaluation: Evaluation, held_out: Sequence[str], held_out_answers: bool) -> str | None:
    who, name, metric = split_name(gate.metric)
    if who == "current":
        return f"{gate.metric} does not exist before the first version; use the metric without current/, with minGain and over: current"
    suites = {suite.name: suite for suite in evaluation.suites or ()}
    if name == FORGETTING:
        suite = suites.get(metric)
        if suite is None or suite.role != "forgetting" or who != "adapter":
            return f"there is no metric {gate.metric}; only suites with role: forgetting have such a metric"
        return (
            f"{gate.metric} already compares with the base model; use max instead of minGain"
            if gate.min_gain is not None
            else None
        )
    if name == HELD_OUT:
        if metric not in held_out:
            if metric in ("evalLoss", "exactMatch", "toolCallAccuracy"):
                why = "needs held-out examples; set spec.dataset.eval or spec.dataset.evalSplit"
                if "evalLoss" in held_out:
                    why = "needs held-out examples with answers, and spec.evaluation.maxSamples above 0"
                return f"{gate.metric} {why}"
            return f"there is no metric {gate.metric}"
        others = {who, gate.over if gate.min_gain is not None else who} - {"adapter"}
        if metric == "trainLoss" and others:
            return f"there is no metric {sorted(others)[0]}/trainLoss; only the adapter has a trainLoss"
        if "fewShot" in others and not held_out_answers:
            return f"there is no metric fewShot/{metric}: the held-out examples are texts, and few-shot examples need questions"
        return None
    suite = suites.get(name)
    if suite is None:
        return f"there is no suite {name} for {gate.metric}"
    if suite.lm_eval is None and metric not in (suite.metrics or get_args(Metric)):
        return f"there is no metric {gate.metric}"
    wants_few_shot = who == "fewShot" or (gate.min_gain is not None and gate.over == "fewShot")
    if wants_few_shot and not _few_shot_possible(suite):
        return f"there is no metric fewShot/{name}/{metric}: only JSONL suites with role: task are measured with few-shot examples"
    return None


def _names(evaluation: Evaluation, held_out: Sequence[str]) -> list[str]:
    names = list(held_out)
    for suite in evaluation.suites or ():
        names += [f"{suite.name}/{metric}" for metric in suite.metrics or ("<metric>",)]
        names += [f"{FORGETTING}/{suite.name}"] if suite.role == "forgetting" else []
    return names


def check(
    gates: Sequence[Gate], metrics: Mapping[str, float], missing: Mapping[tuple[Who, str], str] | None = None
) -> list[str]:
    """Return one message for each gate that `metrics` miss. NaN misses every gate.

    `missing`: (subject, suite) -> why it could not be measured. A gate over the current version passes if there is no
    such version, that is if neither `metrics` nor `missing` has its measurement.
    """
    why, missed = missing or {}, []
    for gate in gates:
        value = metrics.get(gate.metric)
        if value is None:
            names = ", ".join(sorted(metrics)) or "none"
            missed.append(f"{gate.metric} was not measured; {_why(gate, why) or f'the measured metrics are {names}'}")
            continue
        if gate.min is not None and not value >= gate.min:
            missed.append(f"{gate.metric} is {_number(value)}, the gate requires at least {_number(gate.min)}")
        if gate.max is not None and not value <= gate.max:
            missed.append(f"{gate.metric} is {_number(value)}, the gate requires at most {_number(gate.max)}")
        if gate.min_gain is not None and (problem := _missed_gain(gate, gate.min_gain, value, metrics, why)):
            missed.append(problem)
    return missed


OVER = {"base": "the base model", "fewShot": "the base model with examples", "current": "the current version"}


def _missed_gain(
    gate: Gate, wanted: float, value: float, metrics: Mapping[str, float], missing: Mapping[tuple[Who, str], str]
) -> str | None:
    _, suite, metric = split_name(gate.metric)
    plain = f"{suite}/{metric}" if suite else metric
    other = metrics.get(f"{gate.over}/{plain}")
    why = missing.get((gate.over, suite))
    if other is None and why:
        return f"{gate.metric} cannot be compared with {OVER[gate.over]}: {why}"
    if other is None and gate.over == "current":
        return None
    if other is None:
        return f"{gate.metric} cannot be compared with {OVER[gate.over]}: {gate.over}/{plain} was not measured"
    better = gain(gate.metric, value, other)
    # Compare with the precision of the published values, so that the message shows the compared values.
    if not math.isnan(better) and round(better, 6) >= wanted:
        return None
    return (
        f"{gate.metric} is {_number(value)}, {OVER[gate.over]} has {_number(other)}: "
        f"the gain is {_number(better)}, the gate requires at least {_number(wanted)}"
    )


def _why(gate: Gate, missing: Mapping[tuple[Who, str], str]) -> str | None:
    who, suite, metric = split_name(gate.metric)
    if suite == FORGETTING:
        return missing.get(("adapter", metric)) or missing.get(("base", metric))
    return missing.get((who, suite))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"
