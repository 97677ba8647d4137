"""A manifest that the API server must refuse."""

import json

import pytest
from testbed.controlplane import ControlPlane
from testbed.shell import Failed

from worlds.cluster.api import Object


def refused(plane: ControlPlane, manifest: Object) -> str:
    """What kubectl says."""
    path = plane.state / "refused.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(Failed) as error:
        plane.kubectl("apply", "-f", str(path))
    return str(error.value)
