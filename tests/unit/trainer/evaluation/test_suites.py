"""The lines of a suite: the valid forms, the messages about invalid lines, and the metrics that the lines support."""

import json
import subprocess
import sys
from typing import Any

import pytest
from graft.api.evaluation import Suite
from graft.api.recipe import Dataset
from graft.contracts.progress import Reason
from graft_trainer.evaluation.suites import Task, main_metric, metrics_of, needs_chat_template, read_suite
from graft_trainer.run.failures import Failure

SOURCE = {"train": {"uri": "s3://bucket/train.jsonl"}}
CHAT = Dataset.model_validate(SOURCE)
TEXT = Dataset.model_validate(SOURCE | {"format": "text"})
TEMPLATES = Dataset.model_validate(SOURCE | {"format": "instruction", "templates": ["Q: {instruction}\nA: "]})
USER = {"role": "user", "content": "Sky?"}
ANSWER = {"role": "assistant", "content": "Blue."}


def suite(**changes: Any) -> Suite:
    return Suite.model_validate({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"} | changes)


def read(*records: Any, dataset: Dataset = CHAT, **changes: Any) -> list[Task]:
    return read_suite([json.dumps(record).encode() for record in records], suite(**changes), dataset)


def refused(*records: Any, dataset: Dataset = CHAT, **changes: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        read(*records, dataset=dataset, **changes)
    return caught.value


@pytest.mark.parametrize(
    ("record", "dataset", "task"),
    [
        ({"prompt": "Sky?", "answer": "Blue."}, CHAT, Task(1, prompt="Sky?", answers=("Blue.",))),
        ({"prompt": "Sky?", "answers": ["Blue.", "Azure."]}, CHAT, Task(1, prompt="Sky?", answers=("Blue.", "Azure."))),
        ({"messages": [USER], "answer": "Blue."}, CHAT, Task(1, messages=(USER,), answers=("Blue.",))),
        ({"prompt": "Sky?", "choices": ["Red", "Blue"], "label": 1}, CHAT, Task(1, None, "Sky?", ("Blue",), ("Red", "Blue"))),
        ({"prompt": "Sky?", "choices": ["1", "0"], "label": "0"}, CHAT, Task(1, None, "Sky?", ("0",), ("1", "0"))),
        ({"messages": [USER, ANSWER]}, CHAT, Task(1, messages=(USER,), answers=("Blue.",))),
        ({"messages": [USER, ANSWER]}, TEXT, Task(1, messages=(USER,), answers=("Blue.",))),
        ({"instruction": "Sky?", "output": "Blue."}, TEMPLATES, Task(1, prompt="Q: Sky?\nA: ", answers=("Blue.",))),
        ({"text": "The sky is blue."}, TEXT, Task(1, text="The sky is blue.")),
    ],
)  # fmt: skip
def test_valid_lines_become_tasks(record: dict[str, Any], dataset: Dataset, task: Task) -> None:
    assert read(record, dataset=dataset) == [task]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({}, "has neither prompt nor messages (fields: none)"),
        ({"prompt": "Sky?"}, "has neither answer, answers nor choices"),
        ({"prompt": "Sky?", "answer": " "}, "answer is empty"),
        ({"prompt": "Sky?", "answer": "a", "answers": ["b"]}, "has both answer and answers"),
        ({"prompt": "Sky?", "messages": [USER], "answer": "a"}, "has both prompt and messages"),
        ({"prompt": "Sky?", "answers": []}, "answers must be a list of at least 1 text"),
        ({"prompt": "Sky?", "choices": ["a"], "label": 0}, "choices must be a list of at least 2 texts"),
        ({"prompt": "Sky?", "choices": ["a", "a"], "label": 0}, "choices has the same text twice"),
        ({"prompt": "Sky?", "choices": ["a", "b"]}, "there is no label"),
        (
            {"prompt": "Sky?", "choices": ["a", "b"], "label": 2},
            "label is 2; it must be the text of a choice or an index from 0 to 1",
        ),
        ({"prompt": "Sky?", "choices": ["a", "b"], "label": True}, "label is true"),
        ({"prompt": "Sky?", "choices": ["a", "b"], "label": "B"}, 'label "B" is not one of the choices'),
        (
            {"messages": [{"role": "robot", "content": "x"}], "answer": "a"},
            'messages[0].role is "robot", not one of system',
        ),
        ({"messages": [ANSWER]}, "there is no user message before the answer"),
        ("Sky?", "a JSON text, not an object"),
    ],
)
def test_an_invalid_line_is_reported_with_its_problem(record: Any, problem: str) -> None:
    failure = refused({"prompt": "Sky?", "answer": "Blue."}, record)
    assert failure.reason == Reason.DATASET_INVALID
    assert "evaluation.suites quiz (s3://bucket/quiz.jsonl): 1 of 2 lines is invalid: line 2: " in failure.message
    assert problem in failure.message


def test_all_invalid_lines_are_counted_and_a_few_are_shown() -> None:
    failure = refused(*[{"prompt": "?"}] * 8)
    assert "8 of 8 lines are invalid" in failure.message
    assert failure.message.endswith("and 3 more")
    assert '"choices"' in failure.remedy


def test_all_lines_of_a_suite_must_be_of_one_kind() -> None:
    failure = refused({"prompt": "?", "answer": "a"}, {"prompt": "?", "choices": ["a", "b"], "label": 0})
    assert "line 2: has choices, but line 1 has answers" in failure.message


def test_an_empty_suite_is_refused_and_lines_after_the_limit_are_not_read() -> None:
    assert "has no lines" in refused().message
    assert len(read(*[{"prompt": "?", "answer": "a"}] * 5, "no object", limit=3)) == 3


def test_metrics_follow_from_the_lines_unless_they_are_given() -> None:
    assert metrics_of(suite(), "choices") == ("accuracy",)
    assert metrics_of(suite(), "answers") == ("exactMatch", "f1", "rougeL", "loss")
    assert metrics_of(suite(metrics=["loss", "f1"]), "answers") == ("loss", "f1")
    assert main_metric(suite(metrics=["rougeL", "f1"]), "answers") == "rougeL"
    assert (main_metric(suite(), "answers"), main_metric(suite(role="forgetting"), "answers")) == ("f1", "loss")


def test_metrics_that_the_lines_do_not_support_are_refused() -> None:
    failure = refused({"prompt": "?", "answer": "a"}, metrics=["accuracy", "loss"])
    assert failure.reason == Reason.CONFIGURATION_INVALID
    assert "lines with answers do not support the metrics accuracy" in failure.message
    with pytest.raises(Failure, match="the base model is seq2seq"):
        read_suite([b'{"text": "x"}'], suite(), TEXT, "seq2seq")


def test_only_conversations_need_a_chat_template() -> None:
    assert needs_chat_template(read({"messages": [USER], "answer": "Blue."}))
    assert not needs_chat_template(read({"prompt": "Sky?", "answer": "Blue."}))


def test_reading_a_suite_and_checking_gates_needs_no_torch() -> None:
    code = "import sys; import graft_trainer.evaluation.suites, graft_trainer.evaluation.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
