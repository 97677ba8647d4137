"""Check that the API server refuses a manifest."""

import json

import pytest
from testbed.controlplane import ControlPlane
from testbed.shell import Failed

from worlds.cluster.api import Object


def refused(plane: ControlPlane, manifest: Object) -> str:
    """Apply a manifest that must be refused. Return kubectl's message."""
    path = plane.state / "refused.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(Failed) as error:
        plane.kubectl("apply", "-f", str(path))
    return str(error.value)
