"""Calls of tools are measured: the share of the answers with the right calls, on held-out examples and in suites."""

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from graft.api.evaluation import Evaluation, Suite
from graft.api.recipe import Dataset
from graft.toolcalls import Call
from graft_trainer.data.example import Example
from graft_trainer.evaluation.calls import (
    UnknownFormat,
    advise,
    call_scores,
    check_calls,
    format_of,
    unreadable_calls,
)
from graft_trainer.evaluation.suites import Task, main_metric, metrics_of, read_suite, task_of
from graft_trainer.run.failures import Failure
from worlds.evaluation import TRAINING, jsonl, prepared, train_and_evaluate
from worlds.trainer import UNMARKED, make_base, make_tokenizer

CALLED = "{%- for c in m.tool_calls or [] %}"
END = "{%- endfor %}"
TURN = "m['content'] + eos_token }}"
FORMATS = {
    "hermes": UNMARKED.replace(
        TURN,
        "m['content'] }}"
        + CALLED
        + "{{- '<tool_call>' + c.function | tojson + '</tool_call>' }}"
        + END
        + "{{- eos_token }}",
    ),
    "llama3_json": UNMARKED.replace(
        TURN,
        "m['content'] }}"
        + CALLED
        + """{{- '{"name": "' + c.function.name + '", "parameters": ' + c.function.arguments | tojson + '}' }}"""
        + END
        + "{{- eos_token }}",
    ),
    "mistral": UNMARKED.replace(
        TURN,
        "m['content'] }}"
        + CALLED
        + "{{- '[TOOL_CALLS]' + c.function.name + c.function.arguments | tojson }}"
        + END
        + "{{- eos_token }}",
    ),
}
STRANGE = UNMARKED.replace(
    TURN,
    "m['content'] }}"
    + CALLED
    + "{{- c.function.name + '!' + c.function.arguments | tojson }}"
    + END
    + "{{- eos_token }}",
)


def calling(question: str, name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    }


LINES = [calling("On!", "f", a=1), calling("Off!", "f", a=0)]
SAID = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey."}]}


def tasks(*lines: dict[str, Any]) -> list[Task]:
    suite = Suite.model_validate({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"})
    dataset = Dataset.model_validate({"train": {"uri": "s3://bucket/train.jsonl"}})
    return read_suite([json.dumps(line).encode() for line in lines], suite, dataset)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_template_is_found(name: str) -> None:
    assert format_of(tasks(*LINES), make_tokenizer(FORMATS[name])) == name


def test_answers_are_right_if_names_arguments_and_order_are_equal() -> None:
    tokenizer = make_tokenizer(FORMATS["hermes"])
    right = [f'<tool_call>{{"arguments": {{"a": {a}}}, "name": "f"}}</tool_call>' for a in (1, 0)]
    for answers, share in (
        (right, 1.0),
        ([right[0], right[0]], 0.5),
        ([f"Well. {right[0]}", right[1] * 2], 0.5),
        (["", "f(a=0)"], 0.0),
        ([right[0].replace('"f"', '"g"'), right[1].replace("0", '"0"')], 0.0),
    ):
        assert fmean(call_scores(answers, tasks(*LINES), tokenizer)) == share
    with pytest.raises(UnknownFormat, match="hermes, llama3_json"):
        call_scores(right, tasks(*LINES), make_tokenizer(STRANGE))


def test_a_suite_of_calls_has_its_own_metrics() -> None:
    found = tasks(*LINES)
    suite = Suite.model_validate({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"})
    assert [task.kind for task in found] == ["calls", "calls"]
    assert found[0].calls == [Call("f", {"a": 1})]
    assert (
        metrics_of(suite, "calls") == ("toolCallAccuracy", "loss") and main_metric(suite, "calls") == "toolCallAccuracy"
    )
    with pytest.raises(Failure, match="has answers, but line 1 has calls"):
        tasks(LINES[0], SAID)


def test_a_suite_of_calls_that_cannot_be_measured_is_refused_before_training() -> None:
    suite = Suite.model_validate({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"})
    failure = unreadable_calls(suite, tasks(*LINES), make_tokenizer(STRANGE))
    assert failure is not None and "toolCallAccuracy cannot be measured" in failure.message
    assert unreadable_calls(suite, tasks(*LINES), make_tokenizer(FORMATS["hermes"])) is None
    only_loss = suite.model_copy(update={"metrics": ["loss"]})
    assert unreadable_calls(only_loss, tasks(*LINES), make_tokenizer(STRANGE)) is None
    assert unreadable_calls(suite, tasks(SAID), make_tokenizer(STRANGE)) is None


def test_tools_of_a_suites_line_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    (own,) = tasks(LINES[0] | {"tools": [tool]})
    assert own.example().tools == (tool,) and own.example().messages == tuple(LINES[0]["messages"])
    (asked,) = tasks({"messages": LINES[0]["messages"][:1], "tools": [tool], "answer": "On."})
    assert asked.example().tools == (tool,)


def example(line: dict[str, Any]) -> Example:
    return tasks(line)[0].example()


def test_a_gate_on_calls_that_cannot_be_measured_is_refused_before_training(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = Evaluation.model_validate({"gates": [{"metric": "toolCallAccuracy", "min": 0.9}]})
    check_calls(evaluation, [example(line) for line in LINES], make_tokenizer(FORMATS["mistral"]))
    check_calls(Evaluation(), [example(SAID)], make_tokenizer(UNMARKED))
    with pytest.raises(Failure, match="none of the first 200 held-out examples"):
        check_calls(evaluation, [example(SAID)], make_tokenizer(FORMATS["hermes"]))
    with pytest.raises(Failure, match="in a format that Graft cannot read"):
        check_calls(evaluation, [example(line) for line in LINES], make_tokenizer(STRANGE))
    with caplog.at_level(logging.INFO):
        advise([example(SAID), example(LINES[0])], make_tokenizer(FORMATS["hermes"]))
        advise([example(LINES[0])], make_tokenizer(STRANGE))
    assert "spec.toolCallParser of an AdapterDeployment is hermes" in caplog.messages[0]
    assert "cannot read" in caplog.messages[1] and len(caplog.messages) == 2


def test_calls_and_words_are_measured_by_their_own_metrics(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FORMATS["hermes"])
    lines = [*LINES, SAID]
    run = prepared(
        tmp_path / "run",
        base,
        files={"train.jsonl": jsonl(lines * 8), "eval.jsonl": jsonl(lines), "suites/quiz.jsonl": jsonl(LINES)},
        training=TRAINING | {"maxSteps": 120},
        method={"lora": {"rank": 16}},
        evaluation={
            "maxNewTokens": 64,
            "baselines": ["zeroShot", "fewShot"],
            "fewShotExamples": 1,
            "suites": [{"name": "quiz", "uri": "s3://bucket/quiz.jsonl", "maxNewTokens": 64}],
            "gates": [{"metric": "toolCallAccuracy", "min": 0.9}, {"metric": "quiz/toolCallAccuracy", "minGain": 0.5}],
        },
    )
    _, evaluated = train_and_evaluate(run)
    metrics = evaluated.metrics
    assert metrics["toolCallAccuracy"] == metrics["quiz/toolCallAccuracy"] == metrics["exactMatch"] == 1.0
    assert metrics["base/toolCallAccuracy"] == metrics["base/quiz/toolCallAccuracy"] == 0.0
    assert "fewShot/toolCallAccuracy" in metrics and metrics["quiz/loss"] < metrics["base/quiz/loss"]
    assert evaluated.rejected == [] and evaluated.missing == []
    shown = next(sample for sample in evaluated.samples if sample["prompt"] == "On!")
    assert shown["expected"] == "f(a=1)" and '"arguments": {"a": 1}' in shown["answer"]


def test_calls_of_an_example_are_its_last_messages() -> None:
    task = task_of(example(LINES[0]))
    assert task.calls == [Call("f", {"a": 1})] and task.answers == ("",)
    assert task_of(example(SAID)).calls == []
