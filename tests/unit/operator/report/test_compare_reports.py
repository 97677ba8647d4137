"""`graft compare` over report files: the matrix in the terminal, as JSON and as an HTML page."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from graft.cli.__main__ import main
from graft.cli.failure import CliFailure
from graft.cli.reports import parse, published_version, storage_config
from graft.report.compare import PUBLISHED, compare
from graft.report.comparison_page import as_json, render_comparison
from graft.report.document import Report
from graft.report.job import render_job
from graft.report.rank_effect import rank_runs
from worlds.report import document, make_report, old_document

METHODS = ("lora", "full", "qlora", "promptTuning")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for method in METHODS:
        path = tmp_path / method / "report.json"
        path.parent.mkdir()
        path.write_text(json.dumps(document(method)))
        paths.append(str(path))
    return paths


def cells(row: str, *methods: str) -> list[Any]:
    comparison = compare([make_report(method) for method in methods])
    return next(one for one in comparison.rows if one.name == row).cells


def test_four_methods_are_shown_side_by_side(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", *files, "--page", str(page)]) == 0
    text = capsys.readouterr().out
    heads, *_ = text.splitlines()
    assert heads.split("  ")[-1].strip() == "Prompt tuning" and "LoRA r=8" in heads and "Full fine-tuning" in heads
    assert "4 GB (0.50×)" in text and "8 GB (1.00×)" in text  # memory relative to the full run, at any position
    assert "2 MB + 30 kB" in text
    for figures in PUBLISHED.values():
        assert all(figure in text for figure in figures.values())
    html = page.read_text()
    for expected in (
        "The matrix",
        "published: 14 GB (7B)",
        "support-qlora",
        "90 % of the reference",
        "Loss over the steps",
    ):
        assert expected in html, expected
    assert "<script" not in html


def test_json_has_the_numbers(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, "-o", "json", "--page", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "Full fine-tuning"
    assert [run["method"] for run in found["runs"]] == list(METHODS)
    time = next(row for row in found["rows"] if row["name"] == "training time")
    assert [cell["value"] for cell in time["cells"]] == [80.0, 100.0, 150.0, 60.0]
    assert [cell["relative"] for cell in time["cells"]] == [0.8, 1.0, 1.5, 0.6]
    assert time["cells"][0]["published"] == "1.1×"


def with_rank(method: str, rank: int, loss: float) -> Report:
    report = make_report(method)
    return report.model_copy(
        update={
            "hyperparameters": report.hyperparameters | {"rank": rank},
            "metrics": report.metrics | {"evalLoss": loss},
        }
    )


def test_the_effect_of_the_rank_is_shown_if_a_method_has_several_ranks() -> None:
    runs = [with_rank("lora", 16, 0.9), with_rank("lora", 2, 1.2), with_rank("qlora", 8, 1.1), make_report("full")]
    comparison = compare(runs)
    assert [(run.label, run.rank, run.loss) for run in rank_runs(comparison)] == [
        ("LoRA r=2", 2, 1.2),
        ("LoRA r=16", 16, 0.9),
    ]
    html = render_comparison(comparison)
    assert "The effect of the rank" in html and "Held-out loss by rank" in html and "1.2000" in html
    assert [run["rank"] for run in as_json(comparison)["ranks"]] == [2, 16]
    same = compare([with_rank("lora", 8, 0.9), with_rank("lora", 8, 1.2), with_rank("qlora", 2, 1.1)])
    assert rank_runs(same) == [] and "The effect of the rank" not in render_comparison(same)


def test_without_a_full_run_the_first_is_the_reference() -> None:
    comparison = compare([make_report("qlora"), make_report("lora")])
    assert comparison.labels[comparison.reference] == "QLoRA r=8"
    assert cells("training memory", "qlora", "lora")[1].relative == 2.0


def test_the_deployment_size_is_base_model_plus_adapter() -> None:
    values = [cell.value for cell in cells("deployment size", *METHODS)]
    assert values == [7_030_000, 7_000_000, 2_030_000, 7_030_000]


def test_the_latency_of_qlora_is_relative_to_the_base_model_of_the_other_runs() -> None:
    report = make_report("qlora")
    assert report.analysis is not None and report.analysis.latency is not None
    report.analysis.latency.variants["base"].seconds_per_token = 0.1  # 4-bit weights on this machine
    row = next(row for row in compare([make_report("lora"), report]).rows if row.name == "inference latency")
    assert [cell.text for cell in row.cells] == ["1.20×", "1.20×"]
    assert any("busier" in note for note in compare([make_report("lora"), report]).notes)
    alone = compare([report, report])
    assert next(row for row in alone.rows if row.name == "inference latency").cells[0].text == "—"
    assert any("qlora needs a run of another method" in note for note in alone.notes)


def test_the_task_score_is_common_to_all_runs_and_lower_is_better_for_losses() -> None:
    assert [cell.relative for cell in cells("task score", "full", "lora")] == pytest.approx([1.0, 0.9])
    losses = compare(
        [make_report(metrics={"evalLoss": 0.5}), make_report(metrics={"evalLoss": 1.0, "exactMatch": 1.0})]
    )
    row = next(row for row in losses.rows if row.name == "task score")
    assert (row.meaning, [cell.relative for cell in row.cells]) == ("evalLoss", [1.0, 0.5])
    nothing = compare([make_report(), make_report(metrics={"exactMatch": 0.0})])
    assert next(row for row in nothing.rows if row.name == "task score").cells[1].relative == 0
    none = compare([make_report(metrics={"a/f1": 0.5}), make_report(metrics={"b/f1": 0.5})])
    assert "The runs have no score in common." in none.notes


def test_a_note_warns_if_runs_cannot_be_compared() -> None:
    other = make_report(dataset={"digests": {"train": "sha256:other"}})
    assert any("training data" in note for note in compare([make_report(), other]).notes)
    batch = make_report(hyperparameters={"maxSteps": 20, "rank": 8, "perDeviceTrainBatchSize": 4})
    assert any("batch sizes" in note for note in compare([make_report(), batch]).notes)
    assert compare([make_report(), make_report("promptTuning")]).notes == []


def test_runs_of_the_same_method_get_different_labels() -> None:
    job = {"name": "again", "namespace": "shop", "uid": "uid-2"}
    assert compare([make_report(), make_report(job=job)]).labels == ["LoRA r=8, support-lora", "LoRA r=8, again"]
    assert compare([make_report(), make_report()]).labels[0].endswith("(1)")


def test_an_old_report_is_compared_by_the_fields_that_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(old_document()))
    new.write_text(json.dumps(document()))
    assert main(["compare", str(old), str(new), "--page", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert "40 s (1.00×)" in text and "80 s (2.00×)" in text
    assert "—" in text  # old reports contain no measured memory


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not a valid report"),
        (b"[]", "is not a valid report"),
        (b'{"adapter": "a"}', "Field required"),
        (json.dumps(document(schemaVersion=9)).encode(), "upgrade Graft"),
        (b"\xff\xfe", "is not a valid report"),
    ],
)
def test_an_invalid_report_is_refused(content: bytes, expected: str) -> None:
    with pytest.raises(CliFailure, match=expected):
        parse(content, "report.json")


def test_a_missing_file_and_a_single_run_are_explained(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", files[0], str(tmp_path / "none.json")]) == 1
    assert f"cannot read {tmp_path / 'none.json'}: No such file" in capsys.readouterr().err
    assert main(["compare", files[0]]) == 1
    assert "at least two" in capsys.readouterr().err


def test_the_page_of_a_job_is_not_overwritten(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.html").write_text("the page of a job")
    assert main(["compare", *files[:2]]) == 1
    assert "--page" in capsys.readouterr().err
    assert Path("report.html").read_text() == "the page of a job"


def test_a_job_without_a_published_version_reports_its_stage() -> None:
    done = {
        "status": {
            "stage": "Succeeded",
            "adapterRef": {"name": "support-1-2-0", "adapter": "support", "version": "1.2.0"},
        }
    }
    assert published_version(done, "support", "shop").version == "1.2.0"
    running = {"status": {"stage": "Training", "progress": {"percent": 42}}}
    with pytest.raises(CliFailure, match=r"it is Training \(42 %\)") as waiting:
        published_version(running, "support", "shop")
    assert "kubectl wait finetunejob/support -n shop" in waiting.value.remedy
    with pytest.raises(CliFailure, match="it is Failed") as failed:
        published_version({"status": {"stage": "Failed"}}, "support", "shop")
    assert "kubectl describe finetunejob support -n shop" in failed.value.remedy


def test_the_user_can_override_the_endpoint_of_the_store(tmp_path: Path) -> None:
    data = {"endpoint": "http://store.graft:9000", "bucket": "graft", "access-key-id": "k", "secret-access-key": "s"}
    secret = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    assert storage_config(secret, tmp_path, None).endpoint == "http://store.graft:9000"
    config = storage_config(secret, tmp_path, "http://localhost:9000")
    assert (config.endpoint, config.bucket, config.access_key_id) == ("http://localhost:9000", "graft", "k")
    with pytest.raises(CliFailure, match="not valid base64"):
        storage_config({"bucket": "%%%"}, tmp_path, None)


def test_the_examples_of_a_run_are_shown_with_what_the_loss_covers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = document("lora")
    made["dataset"]["statistics"] = {"learned": ["line 1: <|user|>Hi<|assistant|>⟦Hello.</s>⟧", "line 2: …"]}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(made))
    assert main(["examples", str(path)]) == 0
    assert capsys.readouterr().out == "line 1: <|user|>Hi<|assistant|>⟦Hello.</s>⟧\n\nline 2: …\n"
    assert "&lt;|assistant|&gt;⟦Hello.&lt;/s&gt;⟧" in render_job(parse(path.read_bytes(), "report.json"))
    del made["dataset"]["statistics"]
    path.write_text(json.dumps(made))
    assert main(["examples", str(path)]) == 1
    assert "shows no examples" in capsys.readouterr().err
