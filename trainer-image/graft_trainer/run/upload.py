"""Uploads in a separate process, for files that are uploaded during training.

A large file is uploaded in many parts at once, by threads that need Python's global lock all the time. In the training
process such an upload would delay the steps, because on a GPU a step mostly holds this lock.
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

# Bytes. A smaller file needs only a few parts, which use less CPU time than the start of a process.
LARGE = 32 * 2**20
NICENESS = 10  # if the pod has few CPUs, training has priority over the upload


def upload_beside(store: S3Store, key: str, path: Path) -> None:
    """Upload a file during training. Raises StoreError."""
    if path.stat().st_size < LARGE:
        store.upload(key, path)
    else:
        upload_apart(store, key, path)


def upload_apart(store: S3Store, key: str, path: Path) -> None:
    """Run `store.upload` in another process, which ends when this process ends. Raises StoreError."""
    command = [sys.executable, "-m", __name__, key, str(path)]
    read, write = os.pipe()
    with os.fdopen(read) as theirs, os.fdopen(write, "w") as ours:
        # The key goes through a pipe, so that it is in no argument and in no environment variable.
        settings = {
            "config": asdict(store.config),
            "patience": store.patience,
            "folder": str(store.access.folder or ""),
            "accepted": store.access.accepted,
        }
        print(json.dumps(settings), file=ours, flush=True)
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
        message = f"{key}: the process that uploads it {how}: {done.stdout[-500:]}"
        raise StoreError("unavailable", message) from None


def main(key: str, path: str) -> int:
    """Upload one file in the separate process.

    Return the exit code. If it fails, the last line of output is the error as JSON.
    """
    # Signals to the process group are ignored here: the training process knows whether there is time for the upload.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    settings = json.loads(sys.stdin.readline())
    store = S3Store(
        StorageConfig(**settings["config"]),
        patience=settings["patience"],
        folder=Path(settings["folder"]) if settings["folder"] else None,
        accepted=settings["accepted"],
    )
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
