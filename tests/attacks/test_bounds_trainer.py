"""What users' files and earlier attempts give to a training pod: lines, definitions, receipts and configs out of bounds."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from graft.api.evaluation import LmEval, Suite
from graft.api.recipe import Dataset
from graft.artifacts.store import ObjectInfo
from graft.artifacts.versions import InvalidArtifact
from graft.contracts.progress import Progress, Reason
from graft_trainer.checkpoints.checkpoint import complete
from graft_trainer.data.dataset import Reading, read_examples
from graft_trainer.data.lines import LINE, bounded_lines
from graft_trainer.evaluation.current import NotComparable, _reduce_config
from graft_trainer.evaluation.lmeval_tasks import read_definition
from graft_trainer.evaluation.suites import MOST_TASKS, check_data, read_suite
from graft_trainer.model.adapterconfig import reduced_config
from graft_trainer.model.basemodel import check_base_model
from graft_trainer.run.download import fetch_version
from graft_trainer.run.earlier import already_published, find_manifest, memory_halvings
from graft_trainer.run.failures import Failure
from graft_trainer.run.progress import ProgressReporter
from graft_trainer.run.run import read_job
from worlds.trainer import MemoryStore, make_base, make_job, make_run

MIB = 1024 * 1024
CHAT = Dataset.model_validate({"train": {"uri": "s3://bucket/t.jsonl"}, "format": "chat"})
GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
DIGITS = b'{"messages": [], "n": ' + b"9" * 5000 + b"}\n"
BAD = {
    "a number of 5,000 digits": (DIGITS, "too many digits"),
    "deep": (b"[" * 500_000 + b"\n", "nested deeper"),
    "many values": (b"[" + b"0," * 500_000 + b"0]\n", "more than 100000 values"),
    "a line of 40 MB": (b'{"messages": "' + b"x" * (40 * MIB) + b'"}\n', "more than 16777216"),
    "a role of 1 MB": (json.dumps({"messages": [{"role": "x" * MIB}]}).encode() + b"\n", "not one of system"),
    "names of 1 MB": (json.dumps({"n" * MIB: 1}).encode() + b"\n", "there is no field messages"),
}


def read(data: bytes, on_invalid: str = "fail") -> Reading:
    spec = CHAT.model_copy(update={"on_invalid": on_invalid})
    return read_examples(io.BytesIO(data), spec, role="train", uri="s3://bucket/t.jsonl", limit=None)


@pytest.mark.parametrize(("line", "why"), BAD.values(), ids=BAD.keys())
def test_a_line_out_of_bounds_is_named(line: bytes, why: str) -> None:
    """A data author writes a line of 40 MB, or a deep one, or a number of 5,000 digits -> DatasetInvalid names line 2."""
    data = GOOD + line + GOOD
    tracemalloc.start()
    try:
        with pytest.raises(Failure) as caught:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "line 2: " in caught.value.message and why in caught.value.message
    assert len(caught.value.message) < 2_000
    skipped = read(data, "skip")
    assert [example.line for example in skipped.examples] == [1, 3] and skipped.invalid == 1


def test_the_rest_of_a_long_line_is_skipped() -> None:
    """A line of 40 MB between two others -> the offsets of the others are right, and 16 MB of it are held."""
    data = GOOD + b"x" * (40 * MIB) + b"\n" + GOOD
    found = list(bounded_lines(io.BytesIO(data)))
    assert [data[begin : begin + 10] for begin, _ in found] == [GOOD[:10], b"x" * 10, GOOD[:10]]
    assert [len(line) for _, line in found] == [len(GOOD), LINE.size + 1, len(GOOD)]
    assert [line for _, line in bounded_lines(io.BytesIO(b"a\n\nb"))] == [b"a\n", b"\n", b"b"]


SUITE = Suite.model_validate({"name": "quiz", "uri": "s3://bucket/q.jsonl"})


@pytest.mark.parametrize(("line", "why"), BAD.values(), ids=BAD.keys())
def test_a_line_of_a_suite_out_of_bounds_is_named(line: bytes, why: str) -> None:
    """The same lines in a suite -> DatasetInvalid names them."""
    with pytest.raises(Failure) as caught:
        read_suite((one for _, one in bounded_lines(io.BytesIO(GOOD + line))), SUITE, CHAT)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "line 2: " in caught.value.message
    assert len(caught.value.message) < 2_000


def test_a_suite_of_any_number_of_lines_is_refused() -> None:
    """A suite has more lines than fit in memory -> ConfigurationInvalid, which says to set its limit."""
    line = b'{"prompt": "1+1?", "answer": "2"}\n'
    with pytest.raises(Failure, match="more than 100000 lines") as caught:
        read_suite((line for _ in range(10**9)), SUITE, CHAT)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
    limited = SUITE.model_copy(update={"limit": 10})
    assert len(read_suite((line for _ in range(MOST_TASKS + 1)), limited, CHAT)) == 10


@pytest.mark.parametrize("line", [DIGITS, b"[" * 500_000, b"[1]", b"\xff"], ids=lambda line: f"{line[:8]!r}")
def test_data_of_an_lm_eval_task_is_checked_before_the_harness_reads_it(line: bytes) -> None:
    """The data of a user's own lm-eval task is deep -> DatasetInvalid, before a library reads it."""
    with pytest.raises(Failure, match="line 2") as caught:
        check_data([b'{"q": 1}\n', line], SUITE)
    assert caught.value.reason == Reason.DATASET_INVALID


OWN = Suite(name="own", lm_eval=LmEval(task="own", definition="s3://bucket/own.yaml", data="s3://bucket/own.jsonl"))
LAUGHS = "task: own\na0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "task: own\nm0: &m0 {k: v}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "task: own\nmetadata: " + "[" * 100_000,
        "task: own\nmetadata: " + "{a: " * 50_000,
        "task: own\nrepeats: " + "9" * 5000,
        "task: own\nmetadata: 2001-99-99",
        LAUGHS,
        MERGES,
        "task: own\nmetadata: &x [*x]",
        "task: own\nfilter_list: [{name: '" + "x" * 1000 + "', filter: []}]",
        "task: own\nfilter_list: [{filter: []}]",
    ],
    ids=lambda text: f"{text[:40]!r}",
)
def test_a_definition_out_of_bounds_is_refused(text: str) -> None:
    """A definition of an lm-eval task is deep, or repeats itself by aliases and merges -> ConfigurationInvalid at once."""
    tracemalloc.start()
    try:
        with pytest.raises(Failure) as caught:
            read_definition(text.encode(), OWN)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.reason == Reason.CONFIGURATION_INVALID


def test_a_definition_with_a_few_aliases_is_read() -> None:
    """Aliases as people use them -> read."""
    text = "task: own\ndoc_to_text: &t '{{q}}'\ndoc_to_target: *t\nfilter_list: [{name: strict, filter: []}]"
    assert read_definition(text.encode(), OWN)["doc_to_target"] == "{{q}}"


# What earlier attempts left in the store


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 8_000_000,
        b"[" * 200_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b"{}",
        json.dumps({"training": {"halvings": {"a": 1}}}).encode(),
        b"\xff",
    ],
    ids=lambda data: f"{data[:12]!r} x{len(data)}",
)
def test_progress_of_an_earlier_attempt_out_of_bounds_is_not_counted(tmp_path: Path, data: bytes) -> None:
    """An earlier attempt left brackets as its progress -> it is not counted, and the new attempt starts."""
    run = make_run(tmp_path, MemoryStore(), make_job())
    ended: dict[str, Any] = {
        "stage": "Failed",
        "updatedAt": "x",
        "failure": {"reason": "MemoryExceeded", "message": "m", "remedy": "r"},
    }
    kept: dict[str, bytes] = run.store.kept  # type: ignore[attr-defined]
    kept[f"{run.prefix}pod-a/progress.json"] = data
    kept[f"{run.prefix}pod-b/progress.json"] = json.dumps(
        {**ended, "attempt": "pod-b", "training": {"halvings": 1}}
    ).encode()
    kept[f"{run.prefix}pod-c/progress.json"] = json.dumps(
        {**ended, "attempt": "pod-c", "training": {"halvings": "x"}}
    ).encode()
    assert memory_halvings(run) == 2


def test_a_manifest_of_another_job_out_of_bounds_means_that_the_version_exists(tmp_path: Path) -> None:
    """Somebody wrote brackets in the version's place -> VersionExists."""
    run = make_run(tmp_path, MemoryStore(), make_job())
    for data in (b"[" * 8_000_000, b"[" * 500_000, b"{}"):
        run.store.kept[f"{run.version_prefix}manifest.json"] = data  # type: ignore[attr-defined]
        assert find_manifest(run.store, run.version_prefix, "uid-1") == (None, "")
        with pytest.raises(Failure) as caught:
            already_published(run)
        assert caught.value.reason == Reason.VERSION_EXISTS


def test_receipts_out_of_bounds_are_none() -> None:
    """Receipts claim a world of 10^12 ranks, or are brackets -> they belong to no checkpoint."""
    good = {"step": 1, "rank": 0, "worldSize": 1, "of": "x", "size": 3, "sha256": "s", "createdAt": "c"}
    receipts = {
        "a": json.dumps(good | {"worldSize": 10**12}).encode(),
        "b": b"[" * 4000,
        "c": json.dumps(good | {"rank": -1}).encode(),
        "d": json.dumps(good | {"size": 10**30}).encode(),
        "e": json.dumps(good).encode(),
    }
    items = [ObjectInfo(f"r/{name}/checkpoints/step-000001/rank-0000.json", 1, "e") for name in receipts]
    items += [ObjectInfo(f"r/{name}/checkpoints/step-000001/rank-0000.safetensors", 3, "e") for name in receipts]
    found = complete(items, "r/", lambda item: receipts[item.key.split("/")[1]])
    assert [checkpoint.attempt for checkpoint in found] == ["e"]


# What the pod writes is within the operator's bounds


def test_the_pods_own_progress_is_within_its_bounds() -> None:
    """A pod fails with an error of 1 MB on each of 40 measurements -> the progress that it writes is cut, and is read."""
    store = MemoryStore()
    reporter = ProgressReporter(store, "r/", "pod-1", interval=0.01)
    reporter.update(missing=["x" * MIB] * 40, loss=float("nan"), metrics={f"m{n}": 0.5 for n in range(1_300)})
    assert reporter.close(10)
    found = Progress.read(store.kept["r/progress.json"])
    assert found.missing is not None and len(found.missing) == 32
    assert found.loss is None and len(found.metrics or ()) == 1_300


# Job files and configs


@pytest.mark.parametrize("text", ["[" * 500_000, "9" * 5000, "{}"], ids=["deep", "digits", "empty"])
def test_a_job_file_out_of_bounds_is_a_failure(tmp_path: Path, text: str) -> None:
    """The mounted job file is brackets -> a failure with a message, instead of a traceback."""
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(Failure, match="cannot be read"):
        read_job(tmp_path / "job.json")


CONFIGS = {
    "deep": b"[" * 500_000,
    "3 MB": b'{"a": "' + b"x" * (3 * MIB) + b'"}',
    "a number of 5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "a list": b"[1]",
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_out_of_bounds_is_a_failure(tmp_path: Path, data: bytes) -> None:
    """The config of an adapter or a model is deep or large -> AdapterInvalid, BaseModelInvalid or not comparable."""
    with pytest.raises(Failure) as adapter:
        reduced_config(data, "it", "lora", "causal")
    assert adapter.value.reason == Reason.ADAPTER_INVALID
    base = make_base(tmp_path / "base")
    (base / "config.json").write_bytes(data)
    with pytest.raises(Failure) as model:
        check_base_model(base, "tiny")
    assert model.value.reason == Reason.BASE_MODEL_INVALID
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(NotComparable):
        _reduce_config(path, "causal")


@pytest.mark.parametrize("size", [3 * MIB, 10], ids=["as the manifest says", "other than the manifest says"])
def test_a_large_file_of_a_version_is_not_downloaded(tmp_path: Path, size: int) -> None:
    """A version has a config of 3 MB, or an object that is larger than its manifest says -> it is not downloaded."""
    store = MemoryStore()
    data = b"x" * (3 * MIB)
    files = [
        {"name": "adapter_config.json", "size": size, "sha256": "0" * 64},
        {"name": "adapter_model.safetensors", "size": 1, "sha256": "0" * 64},
    ]
    manifest = {
        "adapter": "a", "version": "1.0.0", "method": "lora", "baseModel": {"name": "b", "uri": "s3://b/m"}, "recipe": "r",
        "job": {"name": "j", "namespace": "n", "uid": "u", "attempt": "p"}, "hyperparameters": {}, "files": files,
        "createdAt": "c",
    }  # fmt: skip
    store.kept["t/a/manifest.json"] = json.dumps(manifest).encode()
    store.kept["t/a/adapter_config.json"] = data
    with pytest.raises(InvalidArtifact):
        fetch_version(store, "s3://bucket/t/a/", None, tmp_path / "out")  # type: ignore[arg-type]
    assert not list((tmp_path / "out").iterdir())
