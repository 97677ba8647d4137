"""The adapters' directory on disk, which the engine reads.

<engine name>/            complete and verified: renamed to this name after all its files are written to the disk
.partial-<engine name>/   an unfinished download; a later attempt resumes it
.gone-<engine name>/      being deleted

So if the process is killed at any instruction, an incomplete folder never looks complete.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from graft.artifacts.manifest import Effect

from graft_server.agent.decisions.decide import OUR_NAME, OnDisk

PARTIAL = ".partial-"
GONE = ".gone-"
EFFECT_FILE = "effect.json"  # the record of its effect, from the verified manifest; absent if it has none
UNCHECKED_FILE = "unchecked"  # there from before a load until the loaded adapter was found to work
DIGEST_FILE = "manifest.digest"  # holds the digest of the verified manifest; its mtime is the time of the last use


@dataclass(frozen=True)
class Contents:
    """The contents of the directory, by engine name: complete folders, and incomplete ones."""

    complete: dict[str, OnDisk] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    bytes: int = 0  # of all folders together


class Folders:
    """One adapters' directory. Its methods block. The caller must not use one name in two threads at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, name: str) -> Path:
        """Return the path where the engine finds an adapter."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """Return the folder of a download. Create it if it does not exist."""
        folder = self.root / f"{PARTIAL}{name}"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # the engine runs as another user
        return folder

    def open(self) -> list[str]:
        """Create the directory. Finish the deletions that an earlier process started, and return their folders."""
        self.root.mkdir(parents=True, exist_ok=True)
        graves = sorted(folder.name for folder in self.root.iterdir() if folder.name.startswith(GONE))
        for grave in graves:
            shutil.rmtree(self.root / grave)
        return graves

    def contents(self) -> Contents:
        """Return the current contents. A folder that another thread renames meanwhile may be missing."""
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
        """Return (free bytes, total bytes) of the file system."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def touch(self, name: str) -> None:
        """Record that an adapter is used now."""
        with suppress(FileNotFoundError):
            os.utime(self.place(name) / DIGEST_FILE)

    def effect(self, name: str) -> Effect | None:
        """Return the recorded effect of a complete version, or None if the version has none."""
        try:
            return Effect.model_validate_json((self.place(name) / EFFECT_FILE).read_bytes())
        except FileNotFoundError:
            return None

    def mark_unchecked(self, name: str) -> None:
        """Record that the adapter is loaded from now on and is not known to work."""
        write(self.place(name) / UNCHECKED_FILE, b"")
        sync(self.place(name))

    def mark_checked(self, name: str) -> None:
        """Record that the loaded adapter works."""
        (self.place(name) / UNCHECKED_FILE).unlink(missing_ok=True)

    def unchecked(self) -> set[str]:
        """Return the adapters that a process of the agent has loaded, perhaps, and has not found to work."""
        return {mark.parent.name for mark in self.root.glob(f"*/{UNCHECKED_FILE}")}

    def finish(self, name: str, digest: str) -> None:
        """Rename a verified download to its engine name, after all its files are written to the disk."""
        folder = self.partial(name)
        write(folder / DIGEST_FILE, digest.encode())
        sync(folder)
        self._bury(self.place(name))  # a folder with another digest or without one
        folder.rename(self.place(name))
        sync(self.root)

    def discard(self, name: str) -> None:
        """Delete the incomplete folders of an adapter."""
        self._bury(self.root / f"{PARTIAL}{name}")
        if not (self.place(name) / DIGEST_FILE).exists():
            self._bury(self.place(name))

    def delete(self, name: str) -> None:
        """Delete the complete folder of an adapter."""
        self._bury(self.place(name))

    def _bury(self, folder: Path) -> None:
        """Delete a folder. It is renamed first, so that after a crash no incomplete folder looks complete."""
        grave = self.root / f"{GONE}{folder.name.removeprefix(PARTIAL)}"
        with suppress(FileNotFoundError):
            shutil.rmtree(grave)
        with suppress(FileNotFoundError):
            folder.rename(grave)
            shutil.rmtree(grave)


def write(path: Path, data: bytes) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
