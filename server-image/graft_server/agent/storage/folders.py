"""The adapters' directory on disk, which the engine reads.

<engine name>/            complete and verified: renamed into place after everything in it has reached the disk
.partial-<engine name>/   on its way; a later attempt goes on with the bytes that are there
.gone-<engine name>/      being deleted

So a process that is killed at any instruction leaves nothing that could be taken for more than it is.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from graft_server.agent.decisions.decide import OUR_NAME, OnDisk

PARTIAL = ".partial-"
GONE = ".gone-"
DIGEST_FILE = "manifest.digest"  # the digest that the folder was verified against; its time is when it was last used


@dataclass(frozen=True)
class Contents:
    """What is in the directory: complete folders, and what is neither complete nor of use by itself, by engine name."""

    complete: dict[str, OnDisk] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    bytes: int = 0  # of everything


class Folders:
    """One adapters' directory. Its methods block; no two may work on one name at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, name: str) -> Path:
        """Where the engine finds an adapter."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """The folder of a download, made where it is not there."""
        folder = self.root / f"{PARTIAL}{name}"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # the engine runs as another user
        return folder

    def open(self) -> list[str]:
        """Make the directory, and finish the deletions that an earlier process began; their names."""
        self.root.mkdir(parents=True, exist_ok=True)
        graves = sorted(folder.name for folder in self.root.iterdir() if folder.name.startswith(GONE))
        for grave in graves:
            shutil.rmtree(self.root / grave)
        return graves

    def contents(self) -> Contents:
        """A look at what is there now. What a thread is renaming meanwhile may or may not be in it."""
        complete: dict[str, OnDisk] = {}
        partial: set[str] = set()
        total = 0
        for folder in self.root.iterdir():
            name = folder.name.removeprefix(PARTIAL)
            if not OUR_NAME.fullmatch(name):
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                size = sum(file.stat().st_size for file in folder.iterdir())
                total += size
                mark = folder / DIGEST_FILE
                if name == folder.name and mark.exists():
                    complete[name] = OnDisk(mark.read_text().strip(), size, mark.stat().st_mtime)
                else:
                    partial.add(name)
        return Contents(complete, frozenset(partial), total)

    def free_bytes(self) -> tuple[int, int]:
        """(bytes free to us, bytes of the whole file system)."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def touch(self, name: str) -> None:
        """Note that an adapter is used now."""
        with suppress(FileNotFoundError):
            os.utime(self.place(name) / DIGEST_FILE)

    def finish(self, name: str, digest: str) -> None:
        """Give a verified download its place, by renames after everything has reached the disk."""
        folder = self.partial(name)
        write(folder / DIGEST_FILE, digest.encode())
        sync(folder)
        self._bury(self.place(name))  # a folder of another digest, or without one
        folder.rename(self.place(name))
        sync(self.root)

    def discard(self, name: str) -> None:
        """Remove what is not complete."""
        self._bury(self.root / f"{PARTIAL}{name}")
        if not (self.place(name) / DIGEST_FILE).exists():
            self._bury(self.place(name))

    def delete(self, name: str) -> None:
        """Remove an adapter's files."""
        self._bury(self.place(name))

    def _bury(self, folder: Path) -> None:
        """First its name, so that a crash in between leaves nothing that looks complete."""
        grave = self.root / f"{GONE}{folder.name.removeprefix(PARTIAL)}"
        with suppress(FileNotFoundError):
            shutil.rmtree(grave)
        with suppress(FileNotFoundError):
            folder.rename(grave)
            shutil.rmtree(grave)


def write(path: Path, data: bytes) -> None:
    """Write a small file that is on the disk when this returns."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
