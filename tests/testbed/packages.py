"""The Debian packages that the real node and the tests need. They are installed if they are missing."""

import os
import shutil
from pathlib import Path

from testbed.shell import CACHE, Failed, locked, run, say

# required program, or absolute path of a file -> Debian package
NODE = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "buildah": "buildah",
    "containers-storage": "containers-storage",
    "debootstrap": "debootstrap",
    "socat": "socat",
    "ip": "iproute2",
    "sysctl": "procps",
    "openssl": "openssl",
    "mount": "mount",
    "nsenter": "util-linux",
}
CONTROL_PLANE = {"openssl": "openssl"}
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def missing(programs: dict[str, str]) -> list[str]:
    """Return the packages whose program or file does not exist."""
    return sorted(
        {
            package
            for program, package in programs.items()
            if shutil.which(program, path=PATH) is None and not Path(program).is_file()
        }
    )


def install(programs: dict[str, str]) -> None:
    """Install the missing packages with apt-get. Their services are not started: the testbed runs its own containerd."""
    os.environ["PATH"] = PATH
    needed = missing(programs)
    if not needed:
        return
    if os.geteuid() != 0:
        raise Failed(
            f"these Debian packages are missing: {' '.join(needed)}. Install them, or run this command as root"
        )
    if shutil.which("apt-get") is None:
        raise Failed(f"these packages are missing: {' '.join(needed)}. Install them first: this machine has no apt-get")
    say(f"    installing {' '.join(needed)}")
    log = CACHE / "logs" / "apt.log"
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    with locked("apt"):
        run(["apt-get", "update", "-q"], log, "apt-get update", env=quiet)
        run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *needed], log, "apt-get install", env=quiet)
    still = missing(programs)
    if still:
        raise Failed(f"these packages are still missing after apt-get install: {' '.join(still)}. Read the log {log}")
