"""A control plane with simulated nodes and Graft's CRDs."""

import contextlib
from collections.abc import Iterator

from testbed.controlplane import SERVICE_CIDR, SERVICE_CIDR_IPV6, ControlPlane, control_plane
from testbed.shell import REPOSITORY
from testbed.simulated import add_nodes


@contextlib.contextmanager
def simulated_plane(*, audited: bool = False) -> Iterator[ControlPlane]:
    """Run it during the block. Services may have addresses of both families."""
    with control_plane(audited=audited, service_cidr=f"{SERVICE_CIDR},{SERVICE_CIDR_IPV6}") as plane:
        add_nodes(plane, 2)
        plane.kubectl("apply", "-f", str(REPOSITORY / "crds"))
        plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(REPOSITORY / "crds"))
        yield plane
