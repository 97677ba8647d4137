"""Gates: the metrics that a version must reach, and the messages that the user reads if it does not."""

import math
from typing import Any

import pytest
from graft.api.evaluation import Evaluation, Gate
from graft.contracts.progress import Reason
from graft_trainer.evaluation import gates

QUIZ = {"name": "quiz", "uri": "s3://bucket/quiz.jsonl"}
GENERAL = {"name": "general", "uri": "s3://bucket/general.jsonl", "role": "forgetting"}
ARC = {"name": "arc", "lmEval": {"task": "arc_easy"}}


def gate(metric: str, **wants: Any) -> Gate:
    return Gate.model_validate({"metric": metric} | wants)


def missed(metrics: dict[str, float], *wanted: Gate, missing: Any = None) -> list[str]:
    return gates.check(wanted, metrics, missing)


def evaluation(*wanted: dict[str, Any], suites: Any = (QUIZ, GENERAL, ARC), **changes: Any) -> Evaluation:
    return Evaluation.model_validate({"gates": list(wanted), "suites": list(suites)} | changes)


def test_min_and_max() -> None:
    metrics = {"exactMatch": 0.71, "evalLoss": 1.5}
    assert missed(metrics, gate("exactMatch", min=0.7), gate("evalLoss", max=1.5)) == []
    assert missed(metrics, gate("exactMatch", min=0.8), gate("evalLoss", max=1.2)) == [
        "exactMatch is 0.7100, the gate requires at least 0.8000",
        "evalLoss is 1.5000, the gate requires at most 1.2000",
    ]


@pytest.mark.parametrize(
    ("metric", "value", "other", "gain"),
    [
        ("exactMatch", 0.7, 0.5, 0.2),
        ("evalLoss", 1.5, 1.7, 0.2),  # a lower loss is better
        ("quiz/perplexity", 10.0, 12.0, 2.0),
        ("quiz/loss", 1.0, 1.0, 0.0),
        ("arc/word_perplexity", 10.0, 12.0, 2.0),
    ],
)
def test_min_gain_compares_with_the_base_model(metric: str, value: float, other: float, gain: float) -> None:
    metrics = {metric: value, f"base/{metric}": other}
    assert missed(metrics, gate(metric, minGain=gain)) == []
    [problem] = missed(metrics, gate(metric, minGain=gain + 0.01))
    assert problem.startswith(f"{metric} is {value:.4f}, the base model has {other:.4f}: the gain is {gain:.4f}")


def test_gates_over_few_shot_and_over_the_current_version() -> None:
    metrics = {"quiz/f1": 0.6, "fewShot/quiz/f1": 0.7, "current/quiz/f1": 0.6}
    [problem] = missed(metrics, gate("quiz/f1", minGain=0, over="fewShot"))
    assert "the base model with examples has 0.7000: the gain is -0.1000" in problem
    assert missed(metrics, gate("quiz/f1", minGain=0, over="current")) == []


def test_a_gate_over_current_passes_without_a_version_but_not_if_it_cannot_be_measured() -> None:
    wanted = gate("quiz/f1", minGain=0.1, over="current")
    assert missed({"quiz/f1": 0.6}, wanted) == []
    [problem] = missed({"quiz/f1": 0.6}, wanted, missing={("current", "quiz"): "1.0.0 belongs to another base model"})
    assert problem == "quiz/f1 cannot be compared with the current version: 1.0.0 belongs to another base model"


@pytest.mark.parametrize("wants", [{"min": 0.0}, {"max": 9.9}, {"minGain": -9.9}])
def test_nan_passes_no_gate(wants: dict[str, float]) -> None:
    assert len(missed({"evalLoss": math.nan, "base/evalLoss": 1.0}, gate("evalLoss", **wants))) == 1


def test_a_gate_on_an_unmeasured_metric_is_missed_and_lists_the_measured_metrics() -> None:
    assert missed({"evalLoss": 1.0}, gate("quiz/f1", min=0.5)) == [
        "quiz/f1 was not measured; the measured metrics are evalLoss"
    ]
    [problem] = missed({"quiz/f1": 0.5}, gate("quiz/f1", minGain=0))
    assert problem == "quiz/f1 cannot be compared with the base model: base/quiz/f1 was not measured"


def test_a_gate_on_a_failed_measurement_is_missed_with_the_reason() -> None:
    why = "Memory ran out"
    wanted = [gate("quiz/f1", min=0.5), gate("general/loss", minGain=0), gate("forgetting/general", max=1)]
    missing = {("adapter", "quiz"): why, ("base", "general"): why}
    assert missed({"general/loss": 1.0}, *wanted, missing=missing) == [
        "quiz/f1 was not measured; Memory ran out",
        "general/loss cannot be compared with the base model: Memory ran out",
        "forgetting/general was not measured; Memory ran out",
    ]


@pytest.mark.parametrize(
    "metric",
    [
        "exactMatch", "evalLoss", "trainLoss", "base/evalLoss", "fewShot/exactMatch", "quiz/f1", "base/quiz/accuracy",
        "fewShot/quiz/f1", "arc/acc_norm", "base/arc/acc", "general/loss", "forgetting/general",
    ],
)  # fmt: skip
def test_valid_metric_names_are_accepted(metric: str) -> None:
    assert gates.unknown(evaluation({"metric": metric, "max": 1}), has_held_out=True) is None


@pytest.mark.parametrize(
    ("wanted", "has_held_out", "problem"),
    [
        ({"metric": "accurracy", "min": 1}, True, "there is no metric accurracy"),
        ({"metric": "exactMatch", "min": 1}, False, "exactMatch needs held-out examples; set spec.dataset.eval or spec.dataset.evalSplit"),
        ({"metric": "quizz/f1", "min": 1}, True, "there is no suite quizz for quizz/f1"),
        ({"metric": "quiz/bleu", "min": 1}, True, "there is no metric quiz/bleu"),
        ({"metric": "forgetting/quiz", "max": 1}, True, "there is no metric forgetting/quiz; only suites with role: forgetting have such a metric"),
        ({"metric": "forgetting/general", "minGain": 0}, True, "use max instead of minGain"),
        ({"metric": "trainLoss", "minGain": 0}, True, "there is no metric base/trainLoss"),
        ({"metric": "arc/acc", "minGain": 0, "over": "fewShot"}, True, "there is no metric fewShot/arc/acc"),
        ({"metric": "general/loss", "minGain": 0, "over": "fewShot"}, True, "there is no metric fewShot/general/loss"),
        ({"metric": "current/quiz/f1", "min": 1}, True, "with minGain and over: current"),
    ],
)  # fmt: skip
def test_invalid_metric_names_are_refused_before_training(
    wanted: dict[str, Any], has_held_out: bool, problem: str
) -> None:
    failure = gates.unknown(evaluation(wanted), has_held_out)
    assert failure is not None and failure.reason == Reason.CONFIGURATION_INVALID
    assert problem in failure.message
    assert "quiz/<metric>" in failure.remedy and "forgetting/general" in failure.remedy


def test_format_text_has_no_answers_to_compare() -> None:
    wanted = {"metric": "exactMatch", "min": 1}
    failure = gates.unknown(evaluation(wanted), has_held_out=True, held_out_answers=False)
    assert failure is not None and "needs held-out examples with answers" in failure.message
    few_shot = {"metric": "evalLoss", "minGain": 0, "over": "fewShot"}
    assert gates.unknown(evaluation(few_shot), has_held_out=True, held_out_answers=False) is not None


@pytest.mark.parametrize("name", ["base", "current", "forgetting"])
def test_a_suite_cannot_have_a_reserved_name(name: str) -> None:
    failure = gates.unknown(evaluation(suites=[QUIZ | {"name": name}]), has_held_out=True)
    assert failure is not None and f"{name} cannot be a suite's name" in failure.message


def test_baselines_are_measured_if_they_are_listed_or_needed() -> None:
    assert gates.plan(evaluation(baselines=[])) == {
        "": ["adapter"],
        "quiz": ["adapter"],
        "general": ["adapter", "base"],  # forgetting compares with the base model
        "arc": ["adapter"],
    }
    assert gates.plan(evaluation(baselines=["zeroShot", "fewShot"])) == {
        "": ["adapter", "base", "fewShot"],
        "quiz": ["adapter", "base", "fewShot"],
        "general": ["adapter", "base"],
        "arc": ["adapter", "base"],
    }
    over_current = {"metric": "quiz/f1", "minGain": 0, "over": "current"}
    over_base = {"metric": "evalLoss", "minGain": 0}
    plan = gates.plan(evaluation(over_current, over_base, baselines=[]))
    assert (plan["quiz"], plan[""]) == (["adapter", "current"], ["adapter", "base"])
    assert gates.plan(evaluation(over_current, baselines=[]), has_current=False)["quiz"] == ["adapter"]
