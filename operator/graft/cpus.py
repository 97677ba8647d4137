"""The number of CPUs that a container may use. The trainer and the engine set torch's number of threads to it."""

import os
from pathlib import Path


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPUs that this container may use: the quota of its cgroup, rounded up, but at most the CPUs it may be
    scheduled on.

    torch counts the cores of the node. With more threads than the quota allows, the kernel throttles all of them.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        if quota in {"max", "-1"}:
            return cores
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cores
