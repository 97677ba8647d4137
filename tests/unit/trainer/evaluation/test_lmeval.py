"""lm-eval tasks: users' definitions cannot run code, and the real harness measures tiny models."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from graft.api.evaluation import Suite
from graft.contracts.progress import Reason
from graft_trainer.evaluation.lmeval import plain_metrics
from graft_trainer.evaluation.lmeval_prefetch import prefetch
from graft_trainer.evaluation.lmeval_tasks import load_task, read_definition
from graft_trainer.run.failures import Failure
from worlds.evaluation import TRAINING, prepared, train_and_evaluate
from worlds.trainer import QUESTIONS, make_base, make_t5

CHOICE = """
task: colours
output_type: multiple_choice
test_split: validation
doc_to_text: "<s><|user|>{{question}}<|assistant|>"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
task: colours_said
output_type: generate_until
doc_to_text: "<s><|user|>{{question}}<|assistant|>"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ANSWERS = list(QUESTIONS.values())
DATA = "\n".join(
    json.dumps({"question": question, "answer": answer, "choices": ANSWERS, "label": ANSWERS.index(answer)})
    for question, answer in QUESTIONS.items()
).encode()
FILES = {
    "suites/pick.yaml": CHOICE.encode(),
    "suites/pick.data.jsonl": DATA,
    "suites/say.yaml": GENERATE.encode(),
    "suites/say.data.jsonl": DATA,
}


def own(name: str, **changes: Any) -> dict[str, Any]:
    task = {"task": "mine", "definition": f"s3://bucket/{name}.yaml", "data": f"s3://bucket/{name}.jsonl"}
    return {"name": name, "lmEval": task | changes}


def suite(name: str = "pick") -> Suite:
    return Suite.model_validate(own(name))


def write(folder: Path, definition: str) -> Path:
    (folder / "pick.yaml").write_text(definition)
    (folder / "pick.data.jsonl").write_bytes(DATA)
    return folder


def test_the_harness_measures_the_tuned_model_and_the_base_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    suites = [own("pick"), own("say") | {"role": "forgetting"}]
    gates = [{"metric": "say/exact_match", "min": 0.9}, {"metric": "pick/acc", "min": 2}]
    run = prepared(
        tmp_path / "run", base, files=FILES, training=TRAINING | {"maxSteps": 100}, method={"lora": {"rank": 16}},
        evaluation={"maxSamples": 0, "suites": suites, "gates": gates},
    )  # fmt: skip
    evaluated = train_and_evaluate(run)[1]
    run.progress.close(2)
    metrics = evaluated.metrics
    assert (metrics["say/exact_match"], metrics["base/say/exact_match"]) == (1.0, 0.0)
    assert metrics["forgetting/say"] == -1.0
    assert metrics["pick/acc"] == metrics["pick/acc_norm"] == 1.0
    assert metrics["base/pick/acc"] < 1.0
    assert not any("stderr" in name or "," in name for name in metrics)
    pick = evaluated.suites[0]
    assert (pick.kind, pick.size, pick.main) == ("lmEval", 3, "acc")
    assert len(evaluated.rejected) == 1 and evaluated.rejected[0].startswith("pick/acc is ")


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_the_harness_measures_models_with_virtual_tokens_and_seq2seq_models(tmp_path: Path, task: str) -> None:
    base = (make_base if task == "causal" else make_t5)(tmp_path / "base")
    run = prepared(
        tmp_path / "run", base, files=FILES, training=TRAINING | {"maxSteps": 2}, task=task,
        method={"promptTuning": {"virtualTokens": 4}},
        evaluation={"maxSamples": 0, "suites": [own("pick", fewShot=1), own("say")]},
    )  # fmt: skip
    metrics = train_and_evaluate(run)[1].metrics
    run.progress.close(2)
    names = {"pick/acc", "pick/acc_norm", "say/exact_match"}
    assert names | {f"base/{name}" for name in names} < metrics.keys()


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        ("task: x\ndoc_to_text: !function utils.text", "the tag !function is not allowed"),
        ("task: x\ndoc_to_text: !!python/object/apply:os.system [id]", "python/object/apply:os.system is not allowed"),
        ("task: x\ninclude: /etc/passwd.yaml", "keys that are not allowed: include"),
        ("task: x\nclass: os.system\nuse_prompt: a.yaml:b", "keys that are not allowed: class, use_prompt"),
        ("task: x\ndataset_path: someone/script", "dataset_path is someone/script"),
        ("task: x\nmetric_list: [{metric: someone/code}]", "must be one of acc, acc_bytes"),
        ("task: x\nmetric_list: [{metric: f1, hf_evaluate: true}]", "hf_evaluate"),
        ("task: x\ngeneration_kwargs: {custom_generate: someone/code}", "not allowed: custom_generate"),
        ("- a list", "it must be a mapping with the task's name in the key task"),
        ("task: [x", "it is not YAML"),
        ("task: x\n" + "#" * 300_000, "bytes, and the limit is"),
    ],
)
def test_a_definition_that_is_unsafe_or_invalid_is_refused(definition: str, problem: str) -> None:
    with pytest.raises(Failure) as caught:
        read_definition(definition.encode(), suite())
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    assert "evaluation.suites pick: the definition of the lm-eval task is refused: " in caught.value.message
    assert problem in caught.value.message


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = CHOICE.replace("{{question}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Failure, match=r"access to attribute '__class__' of 'str' object is unsafe"):
        load_task(suite(), write(tmp_path, escape))


def test_data_without_the_fields_of_the_definition_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="'questions' is undefined") as caught:
        load_task(suite(), write(tmp_path, CHOICE.replace("{{question}}", "{{questions}}")))
    assert caught.value.reason == Reason.DATASET_INVALID


def test_prepare_loads_the_tasks_in_a_separate_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    prefetch([suite()], write(tmp_path, CHOICE), None, None)
    with pytest.raises(Failure, match="the tag !function is not allowed") as caught:
        prefetch([suite()], write(tmp_path, "task: x\ndoc_to_text: !function a.b"), "http://127.0.0.1:9", "token")
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    prefetch([Suite.model_validate({"name": "a", "uri": "s3://bucket/a.jsonl"})], tmp_path, None, None)


def test_metric_names_keep_the_filter_only_if_there_are_several() -> None:
    one = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 1, "sample_len": 3}
    assert plain_metrics([one]) == {"acc": 0.5, "acc_norm": 1.0}
    two = {"exact_match,strict": 0.25, "exact_match,flexible": 0.5}
    assert plain_metrics([two]) == two
    assert plain_metrics([one, one | {"acc,none": 1.0}]) == {"acc": 0.75, "acc_norm": 1.0}
