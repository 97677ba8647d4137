"""Every manifest under examples/ is taken by the API server as it is, with strict field validation."""

from pathlib import Path

import pytest
from testbed.controlplane import ControlPlane
from testbed.shell import REPOSITORY

FOLDERS = sorted({path.parent for path in (REPOSITORY / "examples").rglob("*.yaml")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_example_can_be_applied(plane: ControlPlane, folder: Path) -> None:
    first, *rest = sorted(folder.glob("*.yaml"))
    applied = plane.kubectl("apply", "-f", str(first))  # the namespace must be there before what is in it is looked at
    for path in rest:
        applied += plane.kubectl("apply", "--validate=strict", "--dry-run=server", "-f", str(path))
    assert applied.count("created") >= len(rest)
