"""How many CPUs a container really has; the trainer and the engine set torch's threads by it."""

import os
from pathlib import Path


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this container may use: its cgroup's quota, rounded up, and no more than it may be scheduled on.

    torch counts the node's cores; with more threads than the quota the kernel throttles all of them.
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
