"""evaluate: the metrics of the version, the base model and the few-shot baseline, and suites, forgetting and gates."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.storage import StoreError
from graft.contracts.progress import Progress
from graft.report.document import Report
from graft_trainer.data.example import Example
from graft_trainer.evaluation import evaluate as evaluate_module
from graft_trainer.evaluation import measure
from graft_trainer.evaluation.evaluate import Evaluated, SuiteResult
from graft_trainer.evaluation.subject import Subject
from graft_trainer.pipeline import report_success
from graft_trainer.run.failures import Interrupted
from graft_trainer.run.run import Run
from graft_trainer.train import Trained
from graft_trainer.versions.publish import publish
from worlds.evaluation import ASKED, TRAINING, jsonl, prepared, train_and_evaluate
from worlds.trainer import QUESTIONS, make_t5

ANSWERS = list(QUESTIONS.values())
CHOICES = [{"prompt": question, "choices": ANSWERS, "label": answer} for question, answer in QUESTIONS.items()]
OTHER = [{"prompt": "What is two plus two?", "answers": ["Four.", "It is four."]}]
FILES = {"suites/asked.jsonl": jsonl(ASKED), "suites/pick.jsonl": jsonl(CHOICES), "suites/other.jsonl": jsonl(OTHER)}
SUITES = [
    {"name": "asked", "uri": "s3://bucket/asked.jsonl", "maxNewTokens": 16},
    {"name": "pick", "uri": "s3://bucket/pick.jsonl", "metrics": ["accuracy", "loss", "perplexity"]},
    {"name": "other", "uri": "s3://bucket/other.jsonl", "role": "forgetting", "maxNewTokens": 4},
]
GATES = [
    {"metric": "exactMatch", "min": 0.9},
    {"metric": "pick/accuracy", "minGain": 0.5, "over": "base"},
    {"metric": "asked/f1", "minGain": 0.1, "over": "fewShot"},
    {"metric": "forgetting/other", "max": -5},
]
EVALUATION = {
    "maxNewTokens": 16, "baselines": ["zeroShot", "fewShot"], "fewShotExamples": 2, "suites": SUITES, "gates": GATES,
}  # fmt: skip
World = tuple[Run, Trained, Evaluated]
Asked = dict[str, set[str]]  # subject -> the prompts that it got, as text
ANSWER = "<|assistant|>"
TURN = re.compile(r"<\|user\|>(.*?)<\|assistant\|>(.*?)</s>")


@contextmanager
def listening() -> Iterator[Asked]:
    """Record the prompts of each subject, for generation and for the likelihood of an answer."""
    asked: Asked = {}
    generate, tokenised = measure.generate, measure.tokenised

    def generated(subject: Subject, prompts: list[list[int]], *rest: Any) -> Any:
        asked.setdefault(subject.who, set()).update(subject.tokenizer.batch_decode(prompts))
        return generate(subject, prompts, *rest)

    def compared(example: Example, subject: Subject, *rest: Any) -> Any:
        items = tokenised(example, subject, *rest)
        for item in items:
            text = subject.tokenizer.decode(item.input_ids)
            if subject.task == "causal":  # the answer follows the question: cut it off
                text = text[: text.rindex(ANSWER) + len(ANSWER)]
            asked.setdefault(subject.who, set()).add(text)
        return items

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "generate", generated)
        patch.setattr(measure, "tokenised", compared)
        yield asked


@pytest.fixture(scope="module")
def asked() -> Asked:
    return {}


@pytest.fixture(scope="module")
def world(base: Path, asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> World:
    training = TRAINING | {"maxSteps": 100}
    run = prepared(
        tmp_path_factory.mktemp("run"), base, files=FILES, training=training, method={"lora": {"rank": 16}},
        evaluation=EVALUATION,
    )  # fmt: skip
    with listening() as heard:
        trained, evaluated = train_and_evaluate(run)
    asked.update(heard)
    assert run.progress.close(5)
    return run, trained, evaluated


def suite(evaluated: Evaluated, name: str) -> SuiteResult:
    return next(found for found in evaluated.suites if found.name == name)


def test_training_improves_every_metric(world: World) -> None:
    metrics = world[2].metrics
    for name in ("exactMatch", "asked/exactMatch", "asked/f1", "asked/rougeL", "pick/accuracy"):
        assert metrics[name] == 1.0, name
        assert metrics[f"base/{name}"] < 1.0, name
    for name in ("evalLoss", "asked/loss", "pick/loss"):
        assert metrics[name] < 0.2 < metrics[f"base/{name}"], name
    assert 1.0 < metrics["pick/perplexity"] < 1.3


def test_a_suite_of_the_held_out_questions_has_the_loss_of_the_held_out_examples(world: World) -> None:
    metrics = world[2].metrics
    for who in ("", "base/"):
        # The chat template is applied to the suite's plain prompts, as it is to the questions of the dataset.
        assert metrics[f"{who}asked/loss"] == pytest.approx(metrics[f"{who}evalLoss"], rel=1e-4)
        assert metrics[f"{who}pick/loss"] == pytest.approx(metrics[f"{who}evalLoss"], rel=1e-4)


def test_the_few_shot_baseline_shows_solved_examples_of_other_questions(world: World, asked: Asked) -> None:
    metrics = world[2].metrics
    assert {"fewShot/evalLoss", "fewShot/exactMatch", "fewShot/asked/f1", "fewShot/pick/accuracy"} < metrics.keys()
    questions = set()
    for prompt in asked["fewShot"]:
        question = prompt.removesuffix(ANSWER).rpartition("<|user|>")[2]
        questions.add(question)
        others = {other: answer for other, answer in QUESTIONS.items() if other != question}
        assert dict(TURN.findall(prompt)) == others, prompt
        assert prompt.endswith(f"</s><|user|>{question}{ANSWER}"), "the question must come last, without its answer"
    assert questions == set(QUESTIONS)
    assert not any(TURN.search(prompt) for prompt in asked["base"] | asked["adapter"])
    assert not any(name.startswith("fewShot/other") for name in metrics)  # forgetting suites have no few-shot baseline


def test_forgetting_is_the_loss_minus_the_loss_of_the_base_model(world: World) -> None:
    metrics, other = world[2].metrics, suite(world[2], "other")
    assert (other.role, other.main, other.size) == ("forgetting", "loss", 1)
    assert metrics["forgetting/other"] == pytest.approx(metrics["other/loss"] - metrics["base/other/loss"], abs=1e-4)
    assert other.metrics["base"]["loss"] == metrics["base/other/loss"]


def test_only_missed_gates_are_reported(world: World) -> None:
    run, _, evaluated = world
    value = evaluated.metrics["forgetting/other"]
    assert evaluated.rejected == [f"forgetting/other is {value:.4f}, the gate requires at most -5.0000"]
    sent = Progress.model_validate_json(run.store.kept["team-a/runs/uid-1/pod-1/progress.json"])  # type: ignore[attr-defined]
    assert (sent.stage, sent.rejected, sent.metrics) == ("Evaluating", evaluated.rejected, evaluated.metrics)
    assert (sent.eval_loss, sent.eta_seconds) == (evaluated.metrics["evalLoss"], 0)


def test_sample_answers_are_recorded(world: World) -> None:
    sky = world[2].samples[0]
    assert (sky["prompt"], sky["expected"], sky["answer"]) == ("What colour is the sky?", "It is blue.", "It is blue.")
    assert {"base/answer", "fewShot/answer"} < sky.keys()
    assert suite(world[2], "asked").samples[2]["answer"] == "White it is."
    assert suite(world[2], "pick").samples == []  # multiple choice generates no answers
    assert json.dumps(world[2].samples)


def test_the_evaluation_does_not_change_the_trained_model(world: World) -> None:
    _, trained, evaluated = world
    assert not trained.model.training
    assert trained.model.active_adapter == "default"
    assert evaluated.metrics["trainLoss"] == round(trained.train_loss or 0, 5)


def test_without_baselines_and_gates_only_the_version_is_measured(base: Path, tmp_path: Path) -> None:
    evaluation = {"maxSamples": 0, "baselines": [], "suites": SUITES[1:2]}
    run = prepared(tmp_path, base, files=FILES, training=TRAINING | {"maxSteps": 1}, evaluation=evaluation)
    evaluated = train_and_evaluate(run)[1]
    assert evaluated.metrics.keys() == {"trainLoss", "evalLoss", "pick/accuracy", "pick/loss", "pick/perplexity"}
    assert evaluated.rejected == []
    run.progress.close(5)
    sent = Progress.model_validate_json(run.store.kept["team-a/runs/uid-1/pod-1/progress.json"])  # type: ignore[attr-defined]
    assert sent.rejected is None


def test_failed_measurements_are_reported_and_the_version_is_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_really = evaluate_module._measure

    def measured(run: Run, trained: Trained, subject: Subject, item: Any, *rest: Any) -> None:
        if item.name == "asked":
            raise KeyError("no such choice")
        if item.name == "other" and subject.who == "base":
            raise MemoryError
        measure_really(run, trained, subject, item, *rest)

    monkeypatch.setattr(evaluate_module, "_measure", measured)
    evaluation = EVALUATION | {"gates": [GATES[2], GATES[3], {"metric": "evalLoss", "max": 99}]}
    run = prepared(tmp_path, base, files=FILES, training=TRAINING | {"maxSteps": 1}, evaluation=evaluation)
    trained, evaluated = train_and_evaluate(run)
    assert {"evalLoss", "base/evalLoss", "pick/accuracy", "other/exactMatch"} < evaluated.metrics.keys()
    assert [found.name for found in evaluated.suites] == ["pick", "other"]
    failed = "KeyError: 'no such choice'"
    assert evaluated.missing == [
        f"adapter, asked: {failed}",
        f"base model, asked: {failed}",
        "base model, other: Memory ran out: MemoryError",
        f"base model with examples, asked: {failed}",
    ]
    assert evaluated.rejected == [
        f"asked/f1 was not measured; {failed}",
        "forgetting/other was not measured; Memory ran out: MemoryError",
    ]
    report_success(run, *publish(run, trained, evaluated))
    sent = run.progress.state
    assert (sent.stage, sent.missing, sent.rejected) == ("Succeeded", evaluated.missing, evaluated.rejected)
    report = Report.model_validate_json((run.settings.adapter_dir / "report.json").read_text())
    assert report.evaluation.missing == evaluated.missing
    assert "base model, other: Memory ran out" in (run.settings.adapter_dir / "report.html").read_text()


def test_if_a_baseline_does_not_fit_in_memory_only_its_scores_are_missing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base_model(self: Trained) -> Any:
        raise MemoryError

    monkeypatch.setattr(Trained, "base_model", base_model)
    run = prepared(tmp_path, base, training=TRAINING | {"maxSteps": 1}, evaluation={"maxNewTokens": 4})
    evaluated = train_and_evaluate(run)[1]
    assert evaluated.metrics.keys() == {"trainLoss", "evalLoss", "exactMatch"}
    assert evaluated.missing == ["base model, held-out examples: Memory ran out: MemoryError"]
    assert evaluated.rejected == []


@pytest.mark.parametrize(
    "trouble", [StoreError("unavailable", "503"), ConnectionError("reset"), Interrupted()], ids=["store", "net", "term"]
)
def test_transient_errors_and_interrupts_end_the_attempt_so_that_it_is_retried(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    def measured(*arguments: Any) -> None:
        raise trouble

    monkeypatch.setattr(evaluate_module, "_measure", measured)
    run = prepared(tmp_path, base, training=TRAINING | {"maxSteps": 1})
    with pytest.raises(type(trouble)):
        train_and_evaluate(run)


@pytest.mark.parametrize("method", [{"lora": {"rank": 4}}, {"promptTuning": {"virtualTokens": 4}}, {"full": {}}])
def test_seq2seq_models_have_the_same_metrics(tmp_path: Path, method: dict[str, object]) -> None:
    base = make_t5(tmp_path / "base")
    evaluation = {"maxNewTokens": 8, "suites": SUITES, "baselines": ["zeroShot", "fewShot"], "fewShotExamples": 1}
    run = prepared(
        tmp_path / "run", base, files=FILES, training=TRAINING | {"maxSteps": 20}, method=method, task="seq2seq",
        evaluation=evaluation,
    )  # fmt: skip
    with listening() as asked:
        metrics = train_and_evaluate(run)[1].metrics
    run.progress.close(5)
    assert metrics["evalLoss"] < metrics["base/evalLoss"]
    assert metrics["base/asked/loss"] == pytest.approx(metrics["base/evalLoss"], rel=1e-4)
    assert {"asked/f1", "base/pick/accuracy", "fewShot/asked/loss", "forgetting/other"} < metrics.keys()
    solved = tuple(f"{question} {answer}\n\n" for question, answer in QUESTIONS.items())
    rest = {prompt.partition("\n\n")[2] for prompt in asked["fewShot"] if prompt.startswith(solved)}
    assert len(asked["fewShot"]) == len(rest) == len(QUESTIONS) and rest <= asked["base"]


def test_format_text_has_a_loss_and_no_metrics_of_answers(base: Path, tmp_path: Path) -> None:
    texts = jsonl([{"text": "The sky is blue."}] * 6)
    run = prepared(
        tmp_path,
        base,
        files={"train.jsonl": texts, "eval.jsonl": texts, "suites/texts.jsonl": texts},
        training=TRAINING | {"maxSteps": 2},
        dataset={
            "train": {"uri": "s3://bucket/t.jsonl"},
            "eval": {"uri": "s3://bucket/e.jsonl"},
            "format": "text",
        },
        evaluation={"suites": [{"name": "texts", "uri": "s3://bucket/texts.jsonl"}], "baselines": ["fewShot"]},
    )
    metrics = train_and_evaluate(run)[1].metrics
    run.progress.close(5)
    assert metrics.keys() == {"trainLoss", "evalLoss", "texts/loss", "texts/perplexity"}
    assert metrics["texts/loss"] == pytest.approx(metrics["evalLoss"], rel=1e-4)
