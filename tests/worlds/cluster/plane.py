"""A control plane with simulated nodes and Graft's CRDs."""

import contextlib
from collections.abc import Iterator

from testbed.controlplane import ControlPlane, control_plane
from testbed.shell import REPOSITORY
from testbed.simulated import add_nodes


@contextlib.contextmanager
def simulated_plane(*, audited: bool = False) -> Iterator[ControlPlane]:
    """Run it during the block."""
    with control_plane(audited=audited) as plane:
        add_nodes(plane, 2)
        plane.kubectl("apply", "-f", str(REPOSITORY / "crds"))
        plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(REPOSITORY / "crds"))
        yield plane
