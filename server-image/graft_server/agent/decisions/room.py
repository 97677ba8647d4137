"""Who gets the room on the disk (PURE).

What is wanted comes first, in the order in which it is wanted. Versions that nobody wants any more stay for a quick way back
while there is room for them, the least recently used go first. Nothing that is wanted or that the engine has ever goes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

GIB = 1 << 30
RESERVE = 256 << 20  # bytes of the disk that are never filled: logs and other pods' files need some
SPARE_SHARE = 0.2  # of the disk, left free by versions that are only kept: the kubelet evicts pods below 10 to 15 %


@dataclass(frozen=True)
class Capacity:
    """Bytes for everything, and bytes that versions may take which are only kept."""

    total: int = 1 << 62
    kept: int = 1 << 62


@dataclass(frozen=True)
class Asked:
    """A wanted adapter that is not on the disk. `size` None: its manifest was not read yet.

    `placed`: its room is taken already, a download runs or has left a part. `waiting`: nothing is to be started for it now.
    """

    name: str
    size: int | None
    placed: bool = False
    waiting: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Kept:
    """A version that nobody wants; `used_at` in seconds since the epoch."""

    size: int
    used_at: float


@dataclass(frozen=True)
class Share:
    """What may be fetched, what does not fit and why, and what goes."""

    fetch: list[str] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)
    evict: list[str] = field(default_factory=list)


def capacity(cache_bytes: int | None, used: int, free: int, disk: int) -> Capacity:
    """What the adapters' directory may hold, that has `used` bytes on a file system of `disk` bytes with `free` of them free.

    With `cache_bytes` that is the limit, for kept versions, too; without it they leave a part of the disk free.
    """
    total = used + max(0, free - RESERVE)
    if cache_bytes is not None:
        return Capacity(min(total, cache_bytes), min(total, cache_bytes))
    return Capacity(total, max(0, min(total, used + free - int(SPARE_SHARE * disk))))


def share_out(asked: Iterable[Asked], kept: Mapping[str, Kept], held: int, soon: int, room: Capacity) -> Share:
    """Share out the room. `held`: bytes of what is on the disk and must stay now; `soon`: those of them that nobody wants, so that
    they are free once the engine has let go of them.

    An adapter whose manifest was not read yet is thought to be as large as the one that is looked at, so where room is short
    nobody takes what belongs to one before it, and where there is enough nobody waits.
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
            if there + need <= room.total:  # else the kept ones go first
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
        f"it needs {_gib(size)}, and {_gib(max(0, total - taken))} of {_gib(total)} are left for it: "
        f"attach fewer adapters, or give the adapters' volume more room"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
