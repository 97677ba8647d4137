"""The chart, rendered by helm without a cluster."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.crdgen import ROOT

CHART = ROOT / "charts" / "graft"
Manifest = dict[str, Any]
Template = Callable[..., list[Manifest]]


@pytest.fixture(scope="session")
def helm() -> str:
    """Return the path of the testbed's helm, or of the helm on PATH."""
    try:
        from testbed.binaries import binary

        return str(binary("helm"))
    except Exception as error:
        found = shutil.which("helm")
        if found is None:
            pytest.fail(f"cannot test the chart: no helm on PATH, and the testbed could not build one: {error}")
        return found


def run(helm: str, *arguments: str, values: Manifest | None = None, tmp: Path) -> subprocess.CompletedProcess[str]:
    file = tmp / "values.yaml"
    file.write_text(json.dumps(values or {}))
    command = [helm, *arguments, "--kube-version", "1.34.0", "--values", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def template(helm: str, tmp_path: Path) -> Template:
    """Return a function that renders the chart with some values and returns the manifests."""

    def render(values: Manifest | None = None, *arguments: str) -> list[Manifest]:
        done = run(
            helm,
            "template",
            "graft",
            str(CHART),
            "--namespace",
            "graft-system",
            *arguments,
            values=values,
            tmp=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    return render
