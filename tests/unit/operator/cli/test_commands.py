"""The command line: what works without packages and without a cluster, and what the commands do with a job."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graft.cli.__main__ import main
from graft.cli.failure import CliFailure
from graft.cli.jobs import current_container, restart
from graft.cli.parser import parser
from worlds.report import document

COMMANDS = ["report", "compare", "examples", "logs", "restart", "pull", "verify", "completion"]


def program(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a process that cannot import the packages `without`."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without.split()!r})); from graft.cli.__main__ import main; "
        f"sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_help_and_completion_need_no_package() -> None:
    everything = "kubernetes boto3 pydantic yaml matplotlib jinja2 cryptography"
    for arguments in (["--help"], ["--version"], ["pull", "--help"]):
        done = program(*arguments, without=everything)
        assert done.returncode == 0, done.stderr
    assert all(name in program("--help", without=everything).stdout for name in COMMANDS)
    assert program("--version").stdout.startswith("graft ")


@pytest.mark.parametrize(
    ("without", "arguments"),
    [
        ("kubernetes", ["logs", "support"]),
        ("cryptography", ["verify", "support-1.0.0"]),
        ("matplotlib", ["compare", "a/report.json", "b/report.json"]),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(without: str, arguments: list[str]) -> None:
    done = program(*arguments, without=without)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"needs the package {without}" in done.stderr and "pip install '.[cli]'" in done.stderr


def test_as_a_plugin_it_has_the_name_that_the_user_types(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-graft"])
    assert main(["verify", "support"]) == 1
    assert capsys.readouterr().err.startswith("kubectl graft: support is not the name of a version")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "usage: kubectl graft" in capsys.readouterr().out


def test_the_report_of_a_run_is_printed_for_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    import yaml

    path = tmp_path / "report.json"
    path.write_text(json.dumps(document(precision={"exactMatch": {"n": 100}})))
    assert main(["report", str(path), "--page", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("exactMatch"))
    assert row.split()[-5:] == ["72.2", "to", "87.5", "%", "100"]
    assert "<title>support 1.2.0" in (tmp_path / "page.html").read_text()
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        assert main(["report", str(path), "-o", form]) == 0
        assert read(capsys.readouterr().out)["metrics"]["evalLoss"] == 0.2


class Cluster:
    """One job, and what was set in it."""

    def __init__(self, **job: Any) -> None:
        self.found = {"metadata": {"name": "a", "namespace": "shop", "resourceVersion": "1"}, "spec": {}} | job
        self.restarts: list[int] = []

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        return self.found

    def restart(self, job: dict[str, Any], restarts: int) -> None:
        self.restarts.append(restarts)


@pytest.mark.parametrize(
    ("spec", "status", "expected"), [({}, {}, 1), ({"restarts": 2}, {"restarts": 2}, 3), ({}, {"restarts": 4}, 5)]
)
def test_a_failed_job_is_restarted_once_more(spec: dict[str, int], status: dict[str, Any], expected: int) -> None:
    cluster = Cluster(spec=spec, status=status | {"stage": "Failed"})
    assert restart(cluster, "shop", "a")["restarts"] == expected  # type: ignore[arg-type]
    assert cluster.restarts == [expected]


def test_a_job_that_has_not_failed_is_not_restarted() -> None:
    cluster = Cluster(status={"stage": "Training"})
    with pytest.raises(CliFailure, match="only a job that has Failed can be restarted"):
        restart(cluster, "shop", "a")  # type: ignore[arg-type]
    assert cluster.restarts == []


def pod(**codes: int | None) -> Any:
    """Return a pod whose containers ended with these codes. None: it runs."""

    def status(name: str) -> Any:
        code = codes[name]
        return SimpleNamespace(
            name=name, state=SimpleNamespace(terminated=None if code is None else SimpleNamespace(exit_code=code))
        )

    containers = {name: [SimpleNamespace(name=name)] for name in ("prepare", "train")}
    return SimpleNamespace(
        spec=SimpleNamespace(init_containers=containers["prepare"], containers=containers["train"]),
        status=SimpleNamespace(
            init_container_statuses=[status("prepare")] if "prepare" in codes else None,
            container_statuses=[status("train")] if "train" in codes else None,
        ),
    )


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"prepare": None}, "prepare"),
        ({"prepare": 65}, "prepare"),
        ({"prepare": 0, "train": None}, "train"),
        ({"prepare": 0, "train": 1}, "train"),
        ({"prepare": 0, "train": 0}, "train"),
    ],
)
def test_logs_are_of_the_container_that_runs_or_failed(codes: dict[str, int | None], expected: str) -> None:
    assert current_container(pod(**codes)) == expected


def test_every_command_has_a_text_and_a_function() -> None:
    import graft.cli.commands as commands

    for name in COMMANDS:
        assert callable(getattr(commands, f"run_{name}"))
        assert name in parser().format_help()
