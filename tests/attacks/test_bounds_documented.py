"""The table of docs/operations.md says the limits that the programs have."""

import re
from pathlib import Path

import pytest
from graft.artifacts import manifest
from graft.artifacts.sources import CONFIG_LIMITS, TOKENIZER_LIMITS
from graft.bounded import Limits
from graft.cli.verification import SIGNATURE_LIMITS
from graft.contracts.agent import Residency, Wanted
from graft.contracts.gateway import Demand, Routes
from graft.contracts.job import JobFile, VersionFile
from graft.contracts.progress import Progress, Termination
from graft.report.document import Report
from graft_server.agent.engine.client import ERROR, METRICS_BYTES, MODELS
from graft_server.agent.storage.weights import HEADER
from graft_server.callers import FILE_BYTES
from graft_trainer.checkpoints.checkpoint import Receipt
from graft_trainer.data.lines import LINE
from graft_trainer.evaluation.lmeval_tasks import DEPTH, LARGEST

LIMITS = {
    "`progress.json`": Progress.limits,
    "termination message": Termination.limits,
    "`manifest.json`": manifest.LIMITS,
    "`manifest.sig.json`": SIGNATURE_LIMITS,
    "`report.json`": Report.limits,
    "receipt of a checkpoint": Receipt.limits,
    "job file": JobFile.limits,
    "wanted adapters": Wanted.limits,
    "residency of a pod": Residency.limits,
    "routes of a deployment": Routes.limits,
    "demand": Demand.limits,
    "`config.json`, `adapter_config.json`": CONFIG_LIMITS,
    "`tokenizer_config.json`": TOKENIZER_LIMITS,
    "header of an adapter's safetensors": HEADER,
    "`GET /v1/models`": MODELS,
    "an error of the engine": ERROR,
    "metrics of the engine": Limits(METRICS_BYTES, -1, -1),
    "callers of the engine": Limits(FILE_BYTES, -1, -1),
    "a line of a dataset or a suite": LINE,
    "definition of an lm-eval task": Limits(LARGEST, DEPTH, -1),
}


def documented() -> dict[str, list[str]]:
    text = (
        (Path(__file__).parents[2] / "docs/operations.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[3:6] for row in rows[2:]}


@pytest.mark.parametrize("what", LIMITS)
def test_the_documented_limits_are_the_ones_of_the_programs(what: str) -> None:
    """Whoever reads the table of limits -> reads what the programs enforce."""
    numbers = [-1 if cell == "-" else int(re.sub(",", "", cell)) for cell in documented()[what]]
    assert Limits(*numbers) == LIMITS[what]


def test_every_limit_is_documented() -> None:
    """The table has a row for every message, and no other."""
    assert documented().keys() == LIMITS.keys()
    assert VersionFile.limits == JobFile.limits
