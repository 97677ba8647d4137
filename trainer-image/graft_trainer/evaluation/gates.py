"""Gates and what they need (PURE): which metrics can come to be, who must be measured for them, and which were missed.

A metric's name is its own for the adapter, and has a prefix for what the adapter is compared with: base/ for the base model,
fewShot/ for the base model with examples in its prompt, current/ for the adapter's newest version. forgetting/<suite> says how
much worse than the base model the adapter is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from graft.api.evaluation import Evaluation, Gate, Metric, Suite
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

Who = Literal["adapter", "base", "fewShot", "current"]
HELD_OUT = ""  # the name of the held-out examples among the suites
FORGETTING = "forgetting"
RESERVED = ("base", "current", FORGETTING)  # prefixes that a suite's name must not look like
LOWER_IS_BETTER = ("loss", "evalloss", "trainloss", "perplexity", "bits_per_byte", "brier_score", "ter", "mse", "mae")


def prefixed(who: Who, metric: str) -> str:
    """The name under which a metric of `who` is published."""
    return metric if who == "adapter" else f"{who}/{metric}"


def split_name(name: str) -> tuple[Who, str, str]:
    """(who, suite or HELD_OUT, metric) of a published name."""
    who: Who = "adapter"
    others: tuple[Who, ...] = ("base", "fewShot", "current")
    for other in others:
        if name.startswith(f"{other}/"):
            who, name = other, name.removeprefix(f"{other}/")
            break
    suite, slash, metric = name.partition("/")
    return (who, suite, metric) if slash else (who, HELD_OUT, name)


def lower_is_better(name: str) -> bool:
    """Whether less of the metric is better: losses, perplexities, error measures, and what was forgotten."""
    _, suite, metric = split_name(name)
    return suite == FORGETTING or metric.lower().endswith(LOWER_IS_BETTER)


def gain(name: str, value: float, other: float) -> float:
    """How much better `value` is than `other`."""
    return other - value if lower_is_better(name) else value - other


def plan(evaluation: Evaluation, *, has_current: bool = True) -> dict[str, list[Who]]:
    """Who is measured on what: by suite (and HELD_OUT), the adapter first.

    A baseline is measured where `baselines` lists it, and where a gate or a suite of the role forgetting needs it; the current
    version where a gate needs it. Examples in the prompt help where the task is the adapter's own only.
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
    """Failure(ConfigurationInvalid) for the first name in the gates that cannot come to be, and for suites' names that mean
    two things. `held_out_answers`: whether the held-out examples have answers, which texts have not."""
    for suite in evaluation.suites or ():
        if suite.name in RESERVED:
            return Failure(
                Reason.CONFIGURATION_INVALID,
                f"evaluation.suites: {suite.name} cannot be a suite's name, metrics that begin with {suite.name}/ mean something else",
                "Give the suite another name.",
            )
    held_out = ["trainLoss"]
    if has_held_out:
        held_out += ["evalLoss", "exactMatch"] if held_out_answers and evaluation.max_samples else ["evalLoss"]
    for gate in evaluation.gates or ():
        if problem := _cannot_be(gate, evaluation, held_out, held_out_answers):
            return Failure(
                Reason.CONFIGURATION_INVALID,
                f"evaluation.gates: {problem}",
                f"The metrics of this job are {', '.join(_names(evaluation, held_out))}.",
            )
    return None


def _cannot_be(gate: Gate, evaluation: Evaluation, held_out: Sequence[str], held_out_answers: bool) -> str | None:
    who, name, metric = split_name(gate.metric)
    if who == "current":
        return (
            f"{gate.metric} is only there once there is a version; name the adapter's own metric and say over: current"
        )
    suites = {suite.name: suite for suite in evaluation.suites or ()}
    if name == FORGETTING:
        suite = suites.get(metric)
        if suite is None or suite.role != "forgetting" or who != "adapter":
            return f"there is no {gate.metric}; suites of the role forgetting have one"
        return f"{gate.metric} is a comparison already and takes no minGain" if gate.min_gain is not None else None
    if name == HELD_OUT:
        if metric not in held_out:
            if metric in ("evalLoss", "exactMatch"):
                why = "needs held-out examples: dataset.eval or dataset.evalSplit"
                if "evalLoss" in held_out:
                    why = "needs held-out examples with answers, and maxSamples above 0"
                return f"{gate.metric} {why}"
            return f"there is no {gate.metric}"
        others = {who, gate.over if gate.min_gain is not None else who} - {"adapter"}
        if metric == "trainLoss" and others:
            return f"trainLoss is the adapter's alone, there is no {sorted(others)[0]}/trainLoss"
        if "fewShot" in others and not held_out_answers:
            return f"there is no fewShot/{metric}: texts have no questions to put examples before"
        return None
    suite = suites.get(name)
    if suite is None:
        return f"there is no suite {name} for {gate.metric}"
    if suite.lm_eval is None and metric not in (suite.metrics or get_args(Metric)):
        return f"there is no {gate.metric}"
    wants_few_shot = who == "fewShot" or (gate.min_gain is not None and gate.over == "fewShot")
    if wants_few_shot and not _few_shot_possible(suite):
        return (
            f"there is no fewShot/{name}/{metric}: examples go before the tasks of JSONL suites of the role task only"
        )
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
    """The gates that `metrics` miss, in words; NaN misses every gate.

    `missing` says what could not be measured: who and suite -> why. A gate over the current version passes when there is
    none: when `metrics` has nothing under current/, and `missing` neither.
    """
    why, missed = missing or {}, []
    for gate in gates:
        value = metrics.get(gate.metric)
        if value is None:
            names = ", ".join(sorted(metrics)) or "none"
            missed.append(f"{gate.metric} was not measured; {_why(gate, why) or f'the metrics are {names}'}")
            continue
        if gate.min is not None and not value >= gate.min:
            missed.append(f"{gate.metric} is {_number(value)}, the gate wants at least {_number(gate.min)}")
        if gate.max is not None and not value <= gate.max:
            missed.append(f"{gate.metric} is {_number(value)}, the gate wants at most {_number(gate.max)}")
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
    # The digits that are published decide, so that what the message shows is what was compared.
    if not math.isnan(better) and round(better, 6) >= wanted:
        return None
    return (
        f"{gate.metric} is {_number(value)}, {OVER[gate.over]} has {_number(other)}: "
        f"the gain is {_number(better)}, the gate wants at least {_number(wanted)}"
    )


def _why(gate: Gate, missing: Mapping[tuple[Who, str], str]) -> str | None:
    who, suite, metric = split_name(gate.metric)
    if suite == FORGETTING:
        return missing.get(("adapter", metric)) or missing.get(("base", metric))
    return missing.get((who, suite))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"
