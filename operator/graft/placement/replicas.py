"""Assign adapters to replicas if one replica cannot hold all of them (PURE).

If one replica can hold all adapters, every replica holds all of them. Otherwise each adapter gets two replicas, if there
are two:

1. An adapter stays on its replica while the replica is alive and has capacity for it.
2. First copies are placed before second copies, in the order of the adapters. If no replica has free capacity, spare
   copies of other adapters are removed. If that is not enough, a copy of another adapter moves to another replica.
3. An adapter that has no ready replica in the plan gets a ready one. If it answers only on a replica that it was about
   to leave, it stays there.
4. The remaining capacity takes further copies, of the adapters with the fewest copies first. So a new replica shares
   the load at once.

The work of one plan is bounded (Work). If it is used up, the plan is valid and less complete. The next plan starts from
it and continues.

The last loaded copy of an adapter is never removed. So an adapter that answers keeps answering: it is loaded on another
replica, reported as loaded there, and only then removed from the old one. The same input gives the same plan. Planning
again after a plan was carried out gives the same plan again.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

COPIES = 2
WORK = 1_000_000  # checks of one plan, about a second


@dataclass(frozen=True)
class Capacity:
    """The limits of one replica. None: no limit."""

    adapters: int | None = None
    bytes: int | None = None
    max_rank: int | None = None


@dataclass(frozen=True)
class Item:
    """One adapter. `leaving`: it is an older version that still answers, so it needs no second replica."""

    name: str
    bytes: int = 0
    rank: int = 0
    leaving: bool = False

    def copies(self, replicas: int) -> int:
        """Return how many of `replicas` replicas the adapter should have."""
        return min(1 if self.leaving else COPIES, replicas)


@dataclass(frozen=True)
class ReplicaPod:
    """A replica that is alive.

    `loaded`: the adapters that its engine has. `draining`: adapters that are still loaded, but that the replica must
    unload. `unfit`: adapters that do not fit its base model.
    """

    name: str
    ready: bool = True
    loaded: frozenset[str] = frozenset()
    draining: frozenset[str] = frozenset()
    unfit: frozenset[str] = frozenset()

    def answers(self, name: str) -> bool:
        return self.ready and name in self.loaded

    def has(self, name: str) -> bool:
        """Return whether the replica can keep answering for the adapter."""
        return self.ready and (name in self.loaded or name in self.draining)


class WorkUsedUp(Exception):
    """The plan needs more work than it may use."""


class Work:
    """How many checks planning may still make. A check asks whether one adapter may be on one replica."""

    def __init__(self, left: int = WORK) -> None:
        self.left = left

    def use(self, checks: int) -> None:
        """Count checks. Raises WorkUsedUp."""
        self.left -= checks
        if self.left < 0:
            raise WorkUsedUp


@dataclass(frozen=True)
class Plan:
    """The result. `homes`: adapter -> its replicas, sorted; None: every adapter on every replica.

    `short`: the adapters with fewer replicas than they should have.
    """

    homes: Mapping[str, tuple[str, ...]] | None
    short: tuple[str, ...] = ()


def fits_everywhere(items: Collection[Item], capacity: Capacity) -> bool:
    """Return whether one replica can hold all adapters."""
    return (capacity.adapters is None or len(items) <= capacity.adapters) and (
        capacity.bytes is None or sum(item.bytes for item in items) <= capacity.bytes
    )


def plan(
    items: Sequence[Item],
    pods: Iterable[ReplicaPod],
    capacity: Capacity,
    previous: Mapping[str, Collection[str]],
    *,
    fill: bool = True,
    work: Work | None = None,
) -> Plan:
    """Return the plan. `items`: the most important first. `previous`: adapter -> its replicas in the previous plan.

    `work`: the bound on the work of this plan, by default WORK.
    """
    if fits_everywhere(items, capacity):
        return Plan(None)
    board = _Board({item.name: item for item in items}, {pod.name: pod for pod in pods}, capacity, work or Work())
    board.keep(previous)
    # One step may free capacity for another, so repeat until nothing changes. The loop ends, because each step makes
    # progress of one kind: one more adapter answers, a first copy, a second copy, a ready copy, or a further copy. And
    # no step undoes progress of a kind that comes earlier in this list. If the work is used up, no change is
    # incomplete: each change is made as a whole, after its checks.
    with contextlib.suppress(WorkUsedUp):
        while board.spread() or (fill and board.fill()):
            pass
    board.hold(previous)
    return Plan(
        homes={name: tuple(sorted(homes)) for name, homes in board.homes.items()},
        short=tuple(i.name for i in items if len(board.homes[i.name]) < i.copies(len(board.pods))),
    )


@dataclass
class _Board:
    """A plan in progress."""

    items: dict[str, Item]  # the most important first
    pods: dict[str, ReplicaPod]
    capacity: Capacity
    work: Work
    homes: dict[str, set[str]] = field(default_factory=dict)
    on: dict[str, set[str]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    answering: dict[str, int] = field(default_factory=dict)  # adapter -> number of its homes that answer for it
    ready: dict[str, int] = field(default_factory=dict)  # adapter -> number of its homes that are ready

    def __post_init__(self) -> None:
        self.pods = dict(sorted(self.pods.items()))
        self.homes = {name: set() for name in self.items}
        self.on = {name: set() for name in self.pods}
        self.bytes = dict.fromkeys(self.pods, 0)
        self.answering, self.ready = dict.fromkeys(self.items, 0), dict.fromkeys(self.items, 0)
        self._rank = {name: number for number, name in enumerate(self.items)}

    def keep(self, previous: Mapping[str, Collection[str]]) -> None:
        """Keep the previous replicas.

        If that is now too much for a replica, remove the adapters with the most copies first.
        """
        for name in self.items:
            for pod in previous.get(name, ()):
                if pod in self.pods and name not in self.pods[pod].unfit:
                    self._put(name, pod)
        for pod in self.pods:
            if self._within(len(self.on[pod]), self.bytes[pod]):
                continue
            for name in sorted(self.on[pod], key=lambda name: self._spare(name, pod), reverse=True):
                self._take(name, pod)
                if self._within(len(self.on[pod]), self.bytes[pod]):
                    break

    def spread(self) -> bool:
        """Place first copies, second copies and copies on ready replicas. Return whether anything changed."""
        changed = False
        for item in self.items.values():
            self.work.use(len(self.pods))
            still = [name for name, pod in self.pods.items() if pod.has(item.name)]
            if not self.homes[item.name] & set(still):
                changed |= self._add_on(item, 0, still)
        for level in range(1, COPIES + 1):
            for item in self.items.values():
                if len(self.homes[item.name]) < min(level, item.copies(len(self.pods))):
                    changed |= self._add(item, level, self.pods)
        ready = {name for name, pod in self.pods.items() if pod.ready}
        for item in self.items.values():
            if ready and not self.ready[item.name]:
                changed |= self._add(item, COPIES, sorted(ready))
        return changed

    def _add(self, item: Item, level: int, among: Collection[str]) -> bool:
        """Add one more copy on the emptiest replica. Return whether a replica had capacity for it.

        If no replica has free capacity, adapters with more than `level` copies are removed from a replica, or a copy
        moves.
        """
        if self.capacity.max_rank is not None and item.rank > self.capacity.max_rank:
            return False
        others = [pod for pod in among if pod not in self.homes[item.name]]
        return self._add_on(item, level, others) or self._move_for(item, others)

    def _add_on(self, item: Item, level: int, among: Sequence[str]) -> bool:
        free = [pod for pod in among if self._room(item, pod)]
        if free:
            self._put(item.name, min(free, key=self._share))
            return True
        ways = [(len(given), self._share(pod), pod, given) for pod in among if (given := self._given(item, pod, level))]
        if not ways:
            return False
        _, _, pod, given = min(ways)
        for name in given:
            self._take(name, pod)
        self._put(item.name, pod)
        return True

    def fill(self) -> bool:
        """Add copies of the adapters with the fewest copies while there is free capacity.

        Return whether any was added.
        """
        changed = False
        open_ = [name for name, item in self.items.items() if not item.leaving and self.homes[name]]
        while open_:
            self.work.use(len(open_))
            name = min(open_, key=lambda name: (len(self.homes[name]), self._rank[name]))
            free = [pod for pod in self.pods if pod not in self.homes[name] and self._room(self.items[name], pod)]
            if free:
                self._put(name, min(free, key=self._share))
                changed = True
            else:
                open_.remove(name)
        return changed

    def hold(self, previous: Mapping[str, Collection[str]]) -> None:
        """Keep a moving adapter where it answers until it answers in its new place, even if a limit was lowered."""
        for name, homes in self.homes.items():
            if homes and not any(self.pods[pod].answers(name) for pod in homes):
                homes |= {pod for pod in previous.get(name, ()) if pod in self.pods and self.pods[pod].answers(name)}

    def _given(self, item: Item, pod: str, level: int) -> list[str]:
        """Return the adapters to remove from the replica so that the item fits; [] if that is not enough."""
        given: list[str] = []
        for name in sorted(self.on[pod], key=lambda name: self._spare(name, pod), reverse=True):
            needed = min(level, 1) if self.items[name].leaving else level
            if len(self.homes[name]) > needed and self._may_leave(name, pod, at_once=level == 0):
                given.append(name)
                if self._room(item, pod, given):
                    break
        else:
            return []
        for name in list(given):  # after a large removal, a small one may no longer be needed
            if self._room(item, pod, rest := [other for other in given if other != name]):
                given = rest
        return given

    def _move_for(self, item: Item, others: Iterable[str]) -> bool:
        """Move a copy of another adapter to a replica with free capacity, and put the item in its place.

        Return whether it worked.
        """
        for pod in others:
            for name in sorted(self.on[pod], key=lambda name: self._spare(name, pod), reverse=True):
                if not self._room(item, pod, [name]) or not self._may_leave(name, pod):
                    continue
                free = [to for to in self.pods if to not in self.homes[name] and self._room(self.items[name], to)]
                if free:
                    self._take(name, pod)
                    self._put(name, min(free, key=self._share))
                    self._put(item.name, pod)
                    return True
        return False

    def _may_leave(self, name: str, pod: str, *, at_once: bool = False) -> bool:
        """Return whether the adapter can leave the replica without loss.

        It can if it answers elsewhere. If it does not answer here, it can if another of its replicas is at least as
        ready.
        """
        here, home = self.pods[pod], pod in self.homes[name]
        if here.has(name):
            return self.answering[name] - (home and here.answers(name)) > 0
        return at_once or not here.ready or self.ready[name] - home > 0

    def _spare(self, name: str, pod: str) -> tuple[int, bool, bool, int]:
        """Return a sort key: the adapter with the greatest key is removed first."""
        item = self.items[name]
        return len(self.homes[name]), item.leaving, self._may_leave(name, pod), self._rank[name]

    def _room(self, item: Item, pod: str, without: Sequence[str] = ()) -> bool:
        self.work.use(1 + len(without))
        if item.name in self.pods[pod].unfit:
            return False
        freed = sum(self.items[name].bytes for name in without)
        return self._within(len(self.on[pod]) - len(without) + 1, self.bytes[pod] - freed + item.bytes)

    def _within(self, adapters: int, size: int) -> bool:
        slots, limit = self.capacity.adapters, self.capacity.bytes
        return (slots is None or adapters <= slots) and (limit is None or size <= limit)

    def _share(self, pod: str) -> tuple[float, int, str]:
        """Return a sort key: how full the replica is, then its number of adapters, then its name."""
        slots, limit = self.capacity.adapters, self.capacity.bytes
        shares = [len(self.on[pod]) / slots] if slots else []
        shares += [self.bytes[pod] / limit] if limit else []
        return max(shares, default=0.0), len(self.on[pod]), pod

    def _put(self, name: str, pod: str) -> None:
        if pod not in self.homes[name]:
            self.homes[name].add(pod)
            self.on[pod].add(name)
            self._count(name, pod, 1)

    def _take(self, name: str, pod: str) -> None:
        self.homes[name].remove(pod)
        self.on[pod].remove(name)
        self._count(name, pod, -1)

    def _count(self, name: str, pod: str, sign: int) -> None:
        self.bytes[pod] += sign * self.items[name].bytes
        self.answering[name] += sign * self.pods[pod].answers(name)
        self.ready[name] += sign * self.pods[pod].ready
