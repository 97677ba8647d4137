"""The API server accepts every manifest under examples/ unchanged, with strict field validation."""

from pathlib import Path

import pytest
from testbed.controlplane import ControlPlane
from testbed.shell import REPOSITORY

# The other folders have no resources of Graft.
FOLDERS = sorted({path.parent for path in (REPOSITORY / "examples").rglob("00-namespace.yaml")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_example_can_be_applied(plane: ControlPlane, folder: Path) -> None:
    first, *rest = sorted(folder.glob("*.yaml"))
    applied = plane.kubectl("apply", "-f", str(first))  # the namespace must exist before objects in it can be validated
    for path in rest:
        applied += plane.kubectl("apply", "--validate=strict", "--dry-run=server", "-f", str(path))
    assert applied.count("(server dry run)") >= len(rest)
