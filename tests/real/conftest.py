"""One run of Graft and one of the plain script, which the tests compare, and the table of what they measured."""

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from real.pods import TABLE, Pods, Recipe, Seen
from testbed.objectstore import s3_server
from testbed.real import smollm2, wordnet
from testbed.shell import REPOSITORY

STEPS, HELD_OUT = 40, 24
EVALUATION = {"maxSamples": HELD_OUT, "baselines": ["zeroShot"]}
RESULT = REPOSITORY / "build" / "bench" / "real.md"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    when, cpu = datetime.now(UTC).date(), f"{platform.machine()}, {os.cpu_count()} CPUs"
    lines = [f"SmolLM2-135M-Instruct on WordNet, {when}, {cpu}, load {os.getloadavg()[0]:.1f}", ""]
    lines += ["| | Graft | plain transformers and peft |", "|---|---|---|"]
    lines += [f"| {claim} | {ours} | {theirs} |" for claim, (ours, theirs) in TABLE.items()]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")
    terminalreporter.section(f"what was measured ({RESULT.relative_to(REPOSITORY)})")
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    data = tmp_path_factory.mktemp("data")
    wordnet.write_datasets(data, held_out=HELD_OUT)
    return Recipe(smollm2.model_dir(), data, STEPS, HELD_OUT)


@pytest.fixture(scope="session")
def pods(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with s3_server() as server:
        yield Pods(server, tmp_path_factory.mktemp("pods"), recipe)


@pytest.fixture(scope="session")
def graft(pods: Pods, recipe: Recipe) -> Seen:
    """Return what was seen of a run: trained, evaluated and published as classes 1.0.0."""
    return pods.train(recipe.job("1.0.0", EVALUATION))


@pytest.fixture(scope="session")
def plain(pods: Pods, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the plain script's adapter, and its result."""
    return pods.plain(recipe, "plain")
