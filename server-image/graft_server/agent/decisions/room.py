"""Share the disk space between the adapters (PURE).

Wanted adapters come first, in their order. Versions that are no longer wanted are kept for a fast rollback while there
is space. The least recently used of them are deleted first. A version that is wanted or loaded is never deleted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

GIB = 1 << 30
RESERVE = 256 << 20  # bytes of the disk that stay free for logs and for files of other pods
SPARE_SHARE = 0.2  # of the disk, not used for kept versions: the kubelet evicts pods below 10 to 15 % free space


@dataclass(frozen=True)
class Capacity:
    """Bytes that all versions may take, and bytes up to which unwanted versions are kept."""

    total: int = 1 << 62
    kept: int = 1 << 62


@dataclass(frozen=True)
class Asked:
    """A wanted adapter that is not completely on the disk. `size` is None until its manifest has been read.

    `placed`: its space is reserved, because a download runs or has left a part. `waiting`: it must not be started now.
    `failed`: it has a failure.
    """

    name: str
    size: int | None
    placed: bool = False
    waiting: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Kept:
    """A version on the disk that is no longer wanted. `used_at` is in seconds since the epoch."""

    size: int
    used_at: float


@dataclass(frozen=True)
class Share:
    """The adapters to download, those that do not fit with the reason, and the kept versions to delete."""

    fetch: list[str] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)
    evict: list[str] = field(default_factory=list)


def capacity(cache_bytes: int | None, used: int, free: int, disk: int) -> Capacity:
    """Return the capacity of the adapters' directory, of which `used` bytes are used.

    Its file system has `disk` bytes, of which `free` bytes are free.
    `cache_bytes` limits wanted and kept versions. Without it, kept versions leave a part of the disk free.
    """
    total = used + max(0, free - RESERVE)
    if cache_bytes is not None:
        return Capacity(min(total, cache_bytes), min(total, cache_bytes))
    return Capacity(total, max(0, min(total, used + free - int(SPARE_SHARE * disk))))


def share_out(asked: Iterable[Asked], kept: Mapping[str, Kept], held: int, soon: int, room: Capacity) -> Share:
    """Decide which adapters get disk space.

    `held`: bytes on the disk that must stay now. `soon`: the part of `held` that is not wanted, and becomes free after
    the engine has unloaded it.

    An adapter whose manifest has not been read counts with the size of the adapter that is being decided. So if space
    is short, no adapter takes space that an earlier one needs. If there is enough space, no adapter waits.
    """
    share = Share()
    asked = list(asked)
    taken = held + sum(one.size or 0 for one in asked if one.placed)
    there = taken + sum(version.size for version in kept.values())
    unknown = 0
    for one in asked:
        if one.size is None:
            unknown += not one.failed
            continue
        if one.waiting:
            continue
        need = 0 if one.placed else one.size
        if taken + need > room.total + soon:
            share.refuse[one.name] = _does_not_fit(one.size, taken - soon, room.total)
        elif taken + need * (1 + unknown) <= room.total:
            taken += need
            if there + need <= room.total:  # if not, kept versions must be deleted first
                there += need
                share.fetch.append(one.name)
    limit = min(room.total - taken, room.kept - taken)
    staying = sum(version.size for version in kept.values())
    for name, version in sorted(kept.items(), key=lambda item: (item[1].used_at, item[0])):
        if staying <= limit:
            break
        share.evict.append(name)
        staying -= version.size
    return share


def _does_not_fit(size: int, taken: int, total: int) -> str:
    return (
        f"it needs {_gib(size)}, but only {_gib(max(0, total - taken))} of {_gib(total)} are left for it: attach fewer "
        "adapters, or give the adapters' volume more space (limits.adapterBytesPerReplica, if it is set)"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
