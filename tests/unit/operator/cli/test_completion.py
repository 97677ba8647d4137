"""Completion in the real shells: what a user gets who types words and presses Tab."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from graft.cli.completion import SHELLS, Shell, script
from graft.cli.parser import parser
from testbed import packages
from testbed.binaries import binary
from testbed.shell import wait_for

# typed words -> the words after Tab
UNIQUE = {
    "graft ver": "graft verify",
    "graft verify --ke": "graft verify --key",
    "graft logs --fol": "graft logs --follow",
    "graft report -o y": "graft report -o yaml",
    "graft completion fi": "graft completion fish",
    "graft compare my-re": "graft compare my-report.json",
    "kubectl-graft pul": "kubectl-graft pull",
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[Shell, Path]:
    """Write the script of each shell, beside a file whose name can be completed. Install the shells that are missing."""
    packages.install({"zsh": "zsh", "fish": "fish"})
    folder = tmp_path_factory.mktemp("completion")
    (folder / "my-report.json").write_text("{}")
    for shell in SHELLS:
        (folder / f"graft.{shell}").write_text(script(shell, parser()))
    return {shell: folder / f"graft.{shell}" for shell in SHELLS}


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=clean(folder), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def clean(folder: Path) -> dict[str, str]:
    """Return an environment without the settings of the user who runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "LC_ALL": "C.UTF-8"}


def in_bash(path: Path, words: list[str]) -> list[list[str]]:
    """Return what bash proposes for the last word of each line."""
    lines = [f"source {path}"]
    for line in words:
        typed = line.split(" ")
        lines.append(
            f"COMP_WORDS=({' '.join(repr(word) for word in typed)}); COMP_CWORD={len(typed) - 1}; COMPREPLY=()"
        )
        lines.append('_graft; echo "${COMPREPLY[*]}"')
    return [line.split() for line in run("bash", "--norc", "-c", "\n".join(lines), folder=path.parent).splitlines()]


def in_fish(path: Path, words: list[str]) -> list[list[str]]:
    """Return what fish proposes for the last word of each line, without the descriptions."""
    lines = [f"source {path}", *(f"complete -C {line!r}; echo %%" for line in words)]
    found = run("fish", "--no-config", "-c", "\n".join(lines), folder=path.parent).split("%%\n")
    return [[line.split("\t")[0] for line in group.splitlines()] for group in found[:-1]]


def in_zsh(path: Path, words: list[str]) -> list[str]:
    """Type each line into an interactive zsh, press Tab, and return the line that zsh makes of it."""
    folder, result = path.parent, path.with_name("line")
    start = (
        f"autoload -Uz compinit; compinit -u -D; source {path}; "
        f"show() {{ print -r -- \"$BUFFER\" > {result}; BUFFER= }}; zle -N show; bindkey '^X' show; touch {path}.ready\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f", "-i"], clean(folder))
    try:
        os.write(terminal, start.encode())
        wait_for(Path(f"{path}.ready").exists, 30, "zsh has read the script")
        lines = []
        for line in words:
            result.unlink(missing_ok=True)
            os.write(terminal, f"{line}\t\x18".encode())
            wait_for(lambda: result.exists() and result.read_text().endswith("\n"), 30, f"zsh completes {line!r}")
            lines.append(result.read_text().rstrip())
        return lines
    finally:
        os.close(terminal)  # zsh gets SIGHUP
        os.waitpid(child, 0)


def test_bash_completes_commands_options_and_values(scripts: dict[Shell, Path]) -> None:
    own = {line: whole for line, whole in UNIQUE.items() if "my-" not in line}  # names of files are bash's own part
    found = in_bash(scripts["bash"], [*own, "graft report -o ", "graft report my", "graft "])
    assert found[: len(own)] == [[whole.split()[-1]] for whole in own.values()]
    assert found[len(own) : -1] == [["text", "json", "yaml"], []]
    assert {"report", "pull", "--help", "--version"} <= set(found[-1])


def test_fish_completes_commands_options_and_values(scripts: dict[Shell, Path]) -> None:
    found = in_fish(scripts["fish"], [*UNIQUE, "graft report -o ", "graft "])
    assert found[: len(UNIQUE)] == [[whole.split()[-1]] for whole in UNIQUE.values()]
    assert set(found[-2]) == {"text", "json", "yaml"}
    assert {"report", "pull", "completion"} <= set(found[-1])


def test_zsh_completes_commands_options_and_values(scripts: dict[Shell, Path]) -> None:
    assert in_zsh(scripts["zsh"], list(UNIQUE)) == list(UNIQUE.values())


def test_kubectl_completes_the_plugin(tmp_path: Path) -> None:
    """kubectl asks the program kubectl_complete-graft, if it has found kubectl-graft."""
    for name in ("kubectl-graft", "kubectl_complete-graft"):
        path = tmp_path / name
        code = "from graft.cli.__main__ import complete; complete()"
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        path.chmod(0o755)
    kubectl = binary("kubectl")

    def completed(*words: str) -> list[str]:
        environment = clean(tmp_path) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            [kubectl, "__complete", "graft", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.splitlines()

    assert completed("ver") == ["verify", ":4"]
    assert completed("verify", "--ke") == ["--key", ":4"]
    assert completed("report", "support", "-o", "y") == ["yaml", ":4"]
    assert completed("pull", "support-1.0.0", "--to", "") == [":0"]
