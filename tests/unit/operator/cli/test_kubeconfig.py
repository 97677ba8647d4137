"""Kubeconfigs and clusters that cannot be used: a message of two lines with a remedy, and no traceback."""

import logging
from pathlib import Path

import pytest
import yaml
from graft.cli.__main__ import main
from graft.cli.cluster import Cluster
from graft.cli.failure import CliFailure


def kubeconfig(server: str = "https://127.0.0.1:1", user: object = None) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "a", "cluster": {"server": server}}],
            "users": [{"name": "a", "user": user or {"token": "x"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", "namespace": "shop"}}],
            "current-context": "a",
        }
    )


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "garbage: [",
        "",
        "a",
        "[1]",
        "{}",
        "current-context: a",
        kubeconfig().replace("name: a", "name: b"),
        "\x00",
        "contexts: 5",
    ],
)
def test_a_damaged_kubeconfig_is_reported(use: Path, text: str) -> None:
    use.write_text(text)
    with pytest.raises(CliFailure, match="cannot use the kubeconfig") as caught:
        Cluster(None)
    assert "KUBECONFIG" in caught.value.remedy and "\n" not in str(caught.value)


def test_a_missing_context_and_a_missing_file_are_reported(use: Path) -> None:
    with pytest.raises(CliFailure, match="cannot use the kubeconfig"):
        Cluster(None)
    use.write_text(kubeconfig())
    assert Cluster(None).namespace == "shop"
    with pytest.raises(CliFailure, match=r"cannot use the kubeconfig: .*other"):
        Cluster("other")


def test_a_program_for_the_login_that_fails_is_reported_once(use: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "no-such-program",
        "interactiveMode": "Never",
    }
    use.write_text(kubeconfig(user={"exec": program}))
    before = list(logging.getLogger().handlers)
    assert main(["restart", "support"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert (
        len(said) == 2 and said[0].startswith("graft: cannot log in to the cluster:") and "no-such-program" in said[0]
    )
    assert "kubectl auth whoami" in said[1]
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize(
    ("server", "why"),
    [("https://127.0.0.1:1", "Connection refused"), ("https://no-such-host.invalid", "Name or service not known")],
)
def test_a_cluster_that_does_not_answer_is_named_with_the_cause(
    use: Path, capfd: pytest.CaptureFixture[str], server: str, why: str
) -> None:
    use.write_text(kubeconfig(server))
    assert main(["restart", "support"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"graft: the cluster {server} does not answer: {why}"
    assert said[1] == "Check the kubeconfig's server and your network."


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "pull" in capsys.readouterr().out
