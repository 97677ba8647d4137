"""The machine's settings are what they were, after a node has started and after a start that failed or was killed."""

import json
from pathlib import Path

import pytest
from testbed import shell, traces

BEFORE, KUBELETS = "7", "1"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder like /proc/sys."""
    monkeypatch.setattr(shell, "CACHE", tmp_path / "cache")
    (tmp_path / "state").mkdir()
    for name in traces.SYSCTLS:
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "proc", BEFORE)
    return tmp_path / "proc"


def write(proc: Path, value: str) -> None:
    for name in traces.SYSCTLS:
        (proc / name).write_text(value)


def found(proc: Path) -> set[str]:
    return set(traces.settings(proc).values())


def test_settings_are_restored_once_the_node_has_started(proc: Path, tmp_path: Path) -> None:
    with traces.settings_kept(tmp_path / "state", lambda: None, proc):
        write(proc, KUBELETS)
    assert found(proc) == {BEFORE}

    # What an administrator changes while the cluster runs stays when it stops.
    write(proc, "3")
    traces.remove(tmp_path / "state", "graft-none", proc)
    assert found(proc) == {"3"}


def test_settings_are_restored_after_a_failed_start(proc: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        traces.settings_kept(tmp_path / "state", lambda: write(proc, KUBELETS), proc),
    ):
        raise KeyboardInterrupt  # and the kubelet writes them until it is stopped
    assert found(proc) == {BEFORE}


def test_the_next_down_restores_them_after_a_start_that_was_killed(proc: Path, tmp_path: Path) -> None:
    kept = traces.settings_kept(tmp_path / "state", lambda: None, proc)
    kept.__enter__()
    write(proc, KUBELETS)
    assert json.loads((tmp_path / "state" / "sysctls.json").read_text())["kernel/panic"] == BEFORE
    traces.remove(tmp_path / "state", "graft-none", proc)
    assert found(proc) == {BEFORE}
