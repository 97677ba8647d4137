"""Find the changes after which all adapters fit on the replicas (PURE).

The planner accepts each of these changes. The search for them is bounded: if its work is used up, a change that would help
may be missing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from graft.placement.replicas import COPIES, Capacity, Item, ReplicaPod, Work, plan

TRIED = 16  # candidates that are tried, from the smallest possible one upwards
WORK = 400_000  # checks of the search for one change
MIB = 1 << 20


@dataclass(frozen=True)
class Remedies:
    """The smallest sufficient change of each limit alone.

    None if it alone does not help. `both`: adapters and bytes together.
    """

    replicas: int | None = None
    adapters: int | None = None
    bytes: int | None = None
    both: tuple[int, int] | None = None


def enough(items: Sequence[Item], replicas: int, capacity: Capacity, work: Work | None = None) -> bool:
    """Return whether this number of empty replicas holds all copies of all adapters.

    Adapters of too high a rank do not count. It returns False if the work is used up before the answer is known.
    """
    work = work or Work(WORK)
    if work.left < 0:
        return False
    fitting = [item for item in items if capacity.max_rank is None or item.rank <= capacity.max_rank]
    slots, limit = capacity.adapters, capacity.bytes
    if slots is not None and _copies(fitting, replicas) > slots * replicas:
        return False
    if limit is not None and max([_total(fitting, replicas) / replicas, *(item.bytes for item in fitting)]) > limit:
        return False
    pods = [ReplicaPod(f"{number:04d}") for number in range(replicas)]
    return not plan(fitting, pods, capacity, {}, fill=False, work=work).short


def remedies(items: Sequence[Item], replicas: int, capacity: Capacity) -> Remedies:
    """Return the changes after which all adapters fit, given the replicas and the capacity."""
    replicas = max(1, replicas)
    adapters = _adapters(items, replicas, capacity)
    size = _bytes(items, replicas, capacity)
    both = None
    if adapters is None and size is None and capacity.adapters is not None and capacity.bytes is not None:
        slots = _adapters(items, replicas, replace(capacity, bytes=None))
        limit = _bytes(items, replicas, replace(capacity, adapters=slots)) if slots else None
        both = (slots, limit) if slots and limit else None
    return Remedies(_replicas(items, replicas, capacity), adapters, size, both)


def _replicas(items: Sequence[Item], replicas: int, capacity: Capacity) -> int | None:
    if capacity.bytes is not None and any(item.bytes > capacity.bytes for item in items):
        return None
    least = max(replicas + 1, COPIES)
    if capacity.adapters is not None:
        least = max(least, math.ceil(_copies(items, least) / capacity.adapters))
    if capacity.bytes:
        least = max(least, math.ceil(_total(items, least) / capacity.bytes))
    work = Work(WORK)
    return _first(range(least, least + TRIED), lambda count: enough(items, count, capacity, work))


def _adapters(items: Sequence[Item], replicas: int, capacity: Capacity) -> int | None:
    if capacity.adapters is None:
        return None
    least = max(capacity.adapters + 1, math.ceil(_copies(items, replicas) / replicas))
    work = Work(WORK)
    return _first(
        range(least, least + TRIED), lambda count: enough(items, replicas, replace(capacity, adapters=count), work)
    )


def _bytes(items: Sequence[Item], replicas: int, capacity: Capacity) -> int | None:
    if capacity.bytes is None:
        return None
    least = max(capacity.bytes + 1, *(item.bytes for item in items), math.ceil(_total(items, replicas) / replicas))
    step = max(MIB, max(item.bytes for item in items) // 8)
    sizes = [math.ceil((least + step * number) / MIB) * MIB for number in range(TRIED)]
    work = Work(WORK)
    return _first(sizes, lambda size: enough(items, replicas, replace(capacity, bytes=size), work))


def _copies(items: Iterable[Item], replicas: int) -> int:
    return sum(item.copies(replicas) for item in items)


def _total(items: Iterable[Item], replicas: int) -> int:
    return sum(item.copies(replicas) * item.bytes for item in items)


def _first(candidates: Iterable[int], does: Callable[[int], bool]) -> int | None:
    return next((candidate for candidate in candidates if does(candidate)), None)
