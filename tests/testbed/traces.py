"""Settings and files that a node changes on its host outside of its own folder and namespace, and how they are restored."""

import json
from pathlib import Path

from testbed.shell import output

# The kubelet changes these settings for the whole machine.
SYSCTLS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
RESULTS = Path("/var/lib/cni/results")
LOG_LINKS = Path("/var/log/containers")
NETNS = Path("/run/netns")


def record(state: Path) -> None:
    """Record the settings that the node will change."""
    values = {name: Path("/proc/sys", name).read_text().strip() for name in SYSCTLS}
    (state / "sysctls.json").write_text(json.dumps(values))


def remove(state: Path, network: str) -> None:
    """Restore the settings and remove the files. Missing files are no error."""
    recorded = state / "sysctls.json"
    if recorded.exists():
        for name, value in json.loads(recorded.read_text()).items():
            Path("/proc/sys", name).write_text(value)
    if RESULTS.is_dir():
        for path in RESULTS.glob(f"{network}-*"):
            sandbox = path.name.removeprefix(f"{network}-").rpartition("-")[0]
            (RESULTS / f"cni-loopback-{sandbox}-lo").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    if LOG_LINKS.is_dir():
        for path in LOG_LINKS.iterdir():
            if path.is_symlink() and str(path.readlink()).startswith(f"{state}/"):
                path.unlink(missing_ok=True)
    # `ip netns add` makes its folder a mount point. Unmount the folder if it contains no namespace.
    mounted = any(line.split()[1] == str(NETNS) for line in Path("/proc/mounts").read_text().splitlines())
    if mounted and not any(NETNS.iterdir()):
        output(["umount", str(NETNS)], check=False)
