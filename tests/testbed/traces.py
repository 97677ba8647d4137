"""Settings and files that a node changes on its host outside of its own folder and namespace, and how they are restored."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from testbed.shell import locked, output

# The kubelet writes these settings of the whole machine once, when it starts (setupKernelTunables).
SYSCTLS = (
    "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)  # fmt: skip
RESULTS = Path("/var/lib/cni/results")
LOG_LINKS = Path("/var/log/containers")
NETNS = Path("/run/netns")


def settings(proc: Path = Path("/proc/sys")) -> dict[str, str]:
    """Return the machine's settings that a kubelet changes."""
    return {name: (proc / name).read_text().strip() for name in SYSCTLS if (proc / name).exists()}


@contextlib.contextmanager
def settings_kept(state: Path, stop: Callable[[], None], proc: Path = Path("/proc/sys")) -> Iterator[None]:
    """Restore the machine's settings after the block, in which the kubelet starts and becomes ready.

    So they differ for seconds only, and a cluster that is killed later leaves nothing to restore. If the block fails, `stop`
    is called first: it ends the kubelet, which would write later. If this program is killed, remove() restores. The lock keeps
    a second cluster from recording the values of the first one's kubelet.
    """
    with locked("sysctls"):
        _recorded(state).write_text(json.dumps(settings(proc)))
        try:
            yield
        except BaseException:
            stop()
            raise
        finally:
            _restore(state, proc)


def _restore(state: Path, proc: Path) -> None:
    if (recorded := _recorded(state)).exists():
        for name, value in json.loads(recorded.read_text()).items():
            (proc / name).write_text(value)
        recorded.unlink()


def _recorded(state: Path) -> Path:
    return state / "sysctls.json"


def remove(state: Path, network: str, proc: Path = Path("/proc/sys")) -> None:
    """Restore the settings of a start that was killed, and remove the files. Missing files are no error."""
    _restore(state, proc)
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
