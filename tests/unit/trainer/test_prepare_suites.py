"""prepare checks the suites and gates, like the dataset, before the run takes a GPU."""

import hashlib
import json
from pathlib import Path

import pytest
from graft.contracts.job import JobFile
from graft.contracts.progress import Reason
from graft_trainer.prepare import prepare, prepare_container
from graft_trainer.run.failures import explain
from graft_trainer.run.run import Prepared
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run

TRAIN, EVAL = "team-a/data/train.jsonl", "team-a/data/eval.jsonl"
QUIZ = b'{"prompt": "1 + 1?", "choices": ["1", "2"], "label": 1}\n{"prompt": "2 + 2?", "choices": ["4", "2"], "label": 0}\n'


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore({TRAIN: chat_lines(6), EVAL: chat_lines(3), "quiz.jsonl": QUIZ})
    store.add_folder("models/tiny/", base)
    return store


def job_with(*suites: object, **evaluation: object) -> JobFile:
    return make_job(evaluation={"suites": list(suites)} | evaluation)


def refused(tmp_path: Path, store: MemoryStore, job: JobFile) -> tuple[Reason, str]:
    with pytest.raises(Exception) as caught:
        prepare(make_run(tmp_path, store, job))
    failure = explain(caught.value)
    return failure.reason, failure.message


def test_a_suite_is_put_beside_the_dataset_with_its_digest(tmp_path: Path, store: MemoryStore) -> None:
    run = make_run(tmp_path, store, job_with({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"}))
    prepare_container(run)
    assert (run.settings.dataset_dir / "suites/quiz.jsonl").read_bytes() == QUIZ
    digests = Prepared.read(run.settings.prepared_file).digests
    assert digests["suite/quiz"] == "sha256:" + hashlib.sha256(QUIZ).hexdigest()
    assert set(digests) == {"train", "eval", "suite/quiz"}


def test_an_invalid_line_of_a_suite_is_reported(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["quiz.jsonl"] += b'{"prompt": "3 + 3?", "choices": ["6", "9"], "label": 2}\n'
    reason, message = refused(tmp_path, store, job_with({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"}))
    assert reason == Reason.DATASET_INVALID
    assert "evaluation.suites quiz (s3://bucket/quiz.jsonl): 1 of 3 lines is invalid: line 3" in message


def test_a_missing_suite_is_unavailable(tmp_path: Path, store: MemoryStore) -> None:
    reason, message = refused(tmp_path, store, job_with({"name": "quiz", "uri": "s3://bucket/none.jsonl"}))
    assert reason == Reason.DATASET_UNAVAILABLE
    assert "evaluation.suites[quiz]" in message


def test_a_gate_on_an_unknown_metric_is_refused_before_any_download(tmp_path: Path, store: MemoryStore) -> None:
    store.kept.pop(TRAIN)
    gate = {"metric": "quiz/acuracy", "min": 0.5}
    job = job_with({"name": "quiz", "uri": "s3://bucket/quiz.jsonl"}, gates=[gate])
    reason, message = refused(tmp_path, store, job)
    assert reason == Reason.CONFIGURATION_INVALID
    assert "quiz/acuracy" in message


def test_a_suite_of_conversations_needs_a_chat_template(tmp_path: Path, store: MemoryStore) -> None:
    store.kept.pop("models/tiny/chat_template.jinja")
    store.kept[TRAIN] = b'{"text": "Once upon a time"}\n'
    store.kept["talk.jsonl"] = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "answer": "Hello"}).encode()
    fields = {"dataset": {"train": {"uri": f"s3://bucket/{TRAIN}"}, "format": "text"}}
    talk, quiz = ({"name": name, "uri": f"s3://bucket/{name}.jsonl"} for name in ("talk", "quiz"))
    reason, message = refused(tmp_path, store, make_job(**fields, evaluation={"suites": [quiz, talk]}))
    assert reason == Reason.CONFIGURATION_INVALID
    assert "no chat template, but spec.evaluation.suites talk need one" in message
    prepare(make_run(tmp_path / "2", store, make_job(**fields, evaluation={"suites": [quiz]})))


TASK = """task: sums
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
LM_EVAL = {"task": "sums", "definition": "s3://bucket/sums.yaml", "data": "s3://bucket/sums.jsonl"}


def test_a_users_lm_eval_task_is_loaded_before_the_run_takes_a_gpu(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["sums.yaml"] = TASK.encode()
    store.kept["sums.jsonl"] = b'{"question": "1 + 1?", "choices": ["1", "2"], "label": 1}\n'
    run = make_run(tmp_path, store, job_with({"name": "sums", "lmEval": LM_EVAL}))
    prepare_container(run)
    assert (run.settings.dataset_dir / "suites/sums.yaml").read_text() == TASK
    assert (run.settings.dataset_dir / "suites/sums.data.jsonl").read_bytes() == store.kept["sums.jsonl"]
    digests = Prepared.read(run.settings.prepared_file).digests
    assert set(digests) == {"train", "eval", "suite/sums", "suite/sums/data"}


def test_an_lm_eval_task_that_would_run_code_is_refused(tmp_path: Path, store: MemoryStore) -> None:
    store.kept["sums.yaml"] = TASK.replace('"{{label}}"', "!function sums.target").encode()
    store.kept["sums.jsonl"] = b'{"question": "1 + 1?", "choices": ["1", "2"], "label": 1}\n'
    reason, message = refused(tmp_path, store, job_with({"name": "sums", "lmEval": LM_EVAL}))
    assert reason == Reason.CONFIGURATION_INVALID
    assert "evaluation.suites sums" in message and "!function" in message
