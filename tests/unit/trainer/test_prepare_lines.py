"""Nothing about a line is found for the first time on a GPU: prepare reads and tokenises every line of a dataset."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from graft.contracts.job import JobFile
from graft.contracts.progress import Reason
from graft_trainer.data.read import read_data, without
from graft_trainer.data.tokens import tokenise
from graft_trainer.model.basemodel import load_tokenizer
from graft_trainer.prepare import preflight, prepare_container
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Prepared
from worlds.trainer import MARKED, MemoryStore, chat_lines, make_job, make_run

TRAIN, EVAL = "team-a/data/train.jsonl", "team-a/data/eval.jsonl"
URIS = {"train": {"uri": f"s3://bucket/{TRAIN}"}, "eval": {"uri": f"s3://bucket/{EVAL}"}}
ALTERNATING = (
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}"
)


def line(*turns: str, **more: Any) -> bytes:
    """Return a conversation of `role: words`."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


GOOD = [line(f"user: How much is {n} plus one?", f"assistant: It is {n + 1}.") for n in range(12)]
BAD = [
    line("system: Be brief.", "user: Hi", "assistant: Hello."),
    line("user: Hi", "user: Still there?", "assistant: Yes."),
    line("user: " + "long " * 100, "assistant: Yes."),
    b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "n": ' + b"7" * 5000 + b"}]}\n",
    line("user: Hi", "assistant: a\ufdd1b"),
    line("user: Hi", "assistant: Yes.")[:-9] + b"\n",
    json.dumps({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "So."}]
    }).encode() + b"\n",
]  # fmt: skip


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore({TRAIN: b"".join([*GOOD, *BAD]), EVAL: chat_lines(3)})
    store.add_folder("models/tiny/", base)
    store.kept["models/tiny/chat_template.jinja"] = (ALTERNATING + MARKED).encode()
    return store


def job(**changes: Any) -> JobFile:
    dataset = URIS | {"onInvalid": "skip"} | changes.pop("dataset", {})
    return make_job(dataset=dataset, training={"maxLength": 100, "maxSteps": 4}, **changes)


def test_skipping_skips_every_line_that_cannot_be_used_and_counts_it_by_reason(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, store, job())
    prepare_container(run)
    run.progress.close(2)
    prepared = Prepared.read(run.settings.prepared_file)
    told = prepared.statistics
    assert told.invalid_reasons == {
        "format": 2, "templateRefuses": 2, "tooLong": 1, "controlTokens": 1, "notRendered": 1,
    }  # fmt: skip
    assert (told.examples, told.invalid) == (12, 7)
    text = caplog.text
    assert "dataset.train: 5 of 17 examples are left out: 2 refused by the chat template" in text
    for number in (13, 14, 15, 17, 19):
        assert f"line {number}: " in text
    # train leaves out the same lines, and evaluates without them.
    data = read_data(run.job.dataset, run.settings.dataset_dir, 0)
    tokenizer = load_tokenizer(Path(prepared.base_model_dir), "tiny")
    found = tokenise(data.train, tokenizer, 100, role="train", skip=True)
    assert found.unusable.lines == {13, 14, 15, 17, 19} and len(found.examples) == 12
    assert [example.line for example in without(data.train, found.unusable.lines)] == list(range(1, 13))


def test_without_skipping_all_lines_are_counted_and_the_first_five_are_shown(
    tmp_path: Path, store: MemoryStore
) -> None:
    refused = [line("user: Hi", "user: Still there?", "assistant: Yes.")] * 7
    store.kept[TRAIN] = b"".join([*GOOD, *refused])
    run = make_run(tmp_path, store, job(dataset={"onInvalid": "fail"}))
    with pytest.raises(Failure) as caught:
        preflight(run)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "7 of 19 examples cannot be used, 7 refused by the chat template: line 13: " in caught.value.message
    assert "line 17: " in caught.value.message and "line 18: " not in caught.value.message
    assert caught.value.message.endswith("; and 2 more")
    assert "spec.dataset.onInvalid" in caught.value.remedy


def test_in_a_large_file_every_line_is_read_before_a_gpu_is_taken(
    tmp_path: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft_trainer.prepare.SAMPLE", 3)
    monkeypatch.setattr("graft_trainer.prepare.CHARACTERS", 10)
    store.kept[TRAIN] = b"".join([*GOOD, BAD[0]])
    strict = job(dataset={"onInvalid": "fail"}, preflight=True)
    with pytest.raises(Failure, match=r"line 13: .*roles must alternate"):
        preflight(make_run(tmp_path / "1", store, strict))
    # The pod with the GPUs reads a sample of what the preflight has checked.
    store.kept[TRAIN] = b"".join(GOOD)
    run = make_run(tmp_path / "2", store, strict)
    prepare_container(run)
    assert Prepared.read(run.settings.prepared_file).statistics.sampled


def test_a_suite_that_the_template_refuses_is_named_before_a_gpu_is_taken(tmp_path: Path, store: MemoryStore) -> None:
    store.kept[TRAIN] = b"".join(GOOD)
    store.kept["team-a/data/suite.jsonl"] = line("user: Hi", "user: Again", "assistant: Yes.")
    suites = {"suites": [{"name": "asked", "uri": "s3://bucket/team-a/data/suite.jsonl"}]}
    with pytest.raises(Failure, match=r"suites asked .*line 1: .*roles must alternate"):
        preflight(make_run(tmp_path, store, job(evaluation=suites)))


def test_held_out_examples_that_are_also_in_the_training_data_are_counted(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.kept[TRAIN] = b"".join(GOOD)
    store.kept[EVAL] = GOOD[3] + line("user: New?", "assistant: Yes.") + GOOD[5]
    run = make_run(tmp_path, store, job())
    prepare_container(run)
    assert Prepared.read(run.settings.prepared_file).statistics.repeated == 2
    assert "2 held-out examples are also in the training data" in caplog.text and "(lines 1, 3)" in caplog.text


def test_the_date_in_the_prompts_is_that_of_the_job_in_every_attempt(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store.kept["models/tiny/chat_template.jinja"] = ("{{- strftime_now('%d %b %Y') }}" + MARKED).encode()
    store.kept[TRAIN] = b"".join(GOOD)
    made = {"name": "colours", "namespace": "team-a", "uid": "uid-1", "createdAt": "2026-03-07T23:59:59Z"}
    run = make_run(tmp_path, store, job(job=made))
    prepare_container(run)
    told = Prepared.read(run.settings.prepared_file).statistics
    assert told.prompt_date == "2026-03-07"
    assert told.learned[0] == "line 1: 07 Mar 2026<s><|user|>How much is 0 plus one?<|assistant|>⟦It is 1.</s>⟧"
    assert "Every prompt of this job has 2026-03-07" in caplog.text
    assert told.learned[0] in caplog.text
