"""Uploads in a process of their own, for what is uploaded while training goes on.

Large files go in many parts at once, by threads that want Python's lock all the time: in the training process each upload
holds up the steps beside it, which on a GPU do little but hold that lock.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store

LARGE = (
    32 * 2**20
)  # bytes: a smaller file goes in a few parts, which takes less of the CPUs than the start of a process
NICENESS = 10  # training comes first where the pod has few CPUs


def upload_beside(store: S3Store, key: str, path: Path) -> None:
    """Upload a file while training goes on. StoreError."""
    if path.stat().st_size < LARGE:
        store.upload(key, path)
    else:
        upload_apart(store, key, path)


def upload_apart(store: S3Store, key: str, path: Path) -> None:
    """Run `store.upload` in another process. That process ends with this one. Raises StoreError."""
    command = [sys.executable, "-m", __name__, key, str(path)]
    read, write = os.pipe()
    with os.fdopen(read) as theirs, os.fdopen(write, "w") as ours:
        # Through a pipe, so that the key is in no argument and no environment.
        print(json.dumps({"config": asdict(store.config), "patience": store.patience}), file=ours, flush=True)
        done = subprocess.run(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    if done.returncode == 0:
        return
    try:
        error = json.loads(done.stdout.splitlines()[-1])
        raise StoreError(error["trouble"], error["message"])
    except (IndexError, ValueError, TypeError, KeyError):
        how = (
            f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
        )
        told = f"{key}: the process that uploads it {how}: {done.stdout[-500:]}"
        raise StoreError("unavailable", told) from None


def main(key: str, path: str) -> int:
    """The other process; its last line says as JSON why it failed."""
    # A signal to the whole group is for the training process, which knows whether there is time for this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    told = json.loads(sys.stdin.readline())
    store = S3Store(StorageConfig(**told["config"]), patience=told["patience"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        store.upload(key, Path(path))
    except StoreError as error:
        print(json.dumps({"trouble": error.trouble, "message": str(error)}))
        return 1
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(2)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
