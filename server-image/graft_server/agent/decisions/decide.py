"""What to do next, from what is wanted and what is there (PURE)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from graft.contracts.agent import Wanted, WantedAdapter

from graft_server.agent.decisions.room import Asked, Capacity, Kept, share_out

# <tenant>--<adapter resource>--<digest12>. It also becomes a folder's name, so it can hold no slash.
OUR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*--(?P<adapter>[A-Za-z0-9._-]+)--(?P<digest>[0-9a-f]{12})")


@dataclass(frozen=True)
class Inspect:
    """Read a version's manifest: whether it can be served at all, and how large it is. One that is only expected is not
    signed yet."""

    adapter: WantedAdapter
    expected: bool = False

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Download:
    """Fetch and verify a version and put it into its place."""

    adapter: WantedAdapter

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Load:
    """Tell the engine to load a version that is in its place."""

    adapter: WantedAdapter

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Unload:
    """Tell the engine to forget an adapter."""

    name: str


@dataclass(frozen=True)
class Delete:
    """Remove the files of a version that was kept for a quick way back."""

    name: str


@dataclass(frozen=True)
class Discard:
    """Remove what is left of a download that is not wanted any more."""

    name: str


@dataclass(frozen=True)
class Refuse:
    """Tell that an adapter does not fit on the disk."""

    name: str
    message: str


Action = Inspect | Download | Load | Unload | Delete | Discard | Refuse


@dataclass(frozen=True)
class OnDisk:
    """A complete folder, `used_at` in seconds since the epoch."""

    digest: str
    size_bytes: int = 0
    used_at: float = 0.0


@dataclass(frozen=True)
class Observed:
    """What is there now.

    `on_disk`: complete folders, by engine name. `engine`: what the engine lists, name -> root path; None while it does not
    answer. `busy`: names that an action is running for. `held_back`: names whose last action failed and whose time to try again
    has not come. `failed`: names that have a failure. `drained`: names that no request has used for the drain time. `sizes`:
    bytes of the versions that were inspected. `partial`: names of which part is on disk. `capacity`: what the disk holds.
    `deleting`: room is being made, and what it was made of may still be in the picture.
    """

    on_disk: Mapping[str, OnDisk]
    engine: Mapping[str, str] | None
    busy: Collection[str] = ()
    held_back: Collection[str] = ()
    failed: Collection[str] = ()
    drained: Collection[str] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    partial: Collection[str] = ()
    capacity: Capacity = field(default_factory=Capacity)
    deleting: bool = False


def path_of(adapters_dir: str, name: str) -> str:
    """Where the engine finds the adapter: a new version is a new name and so a new path."""
    return f"{adapters_dir.rstrip('/')}/{name}"


def unwanted_in_engine(wanted: Wanted, engine: Mapping[str, str]) -> list[str]:
    """Adapters with our naming that the engine has and nobody wants: they drain."""
    names = {adapter.engine_name for adapter in wanted.adapters}
    return sorted(name for name in engine if OUR_NAME.fullmatch(name) and name not in names)


def loaded(adapter: WantedAdapter, engine: Mapping[str, str] | None, adapters_dir: str) -> bool:
    """Whether the engine answers for exactly these files."""
    return engine is not None and engine.get(adapter.engine_name) == path_of(adapters_dir, adapter.engine_name)


def decide(wanted: Wanted, seen: Observed, adapters_dir: str) -> list[Action]:
    """The actions that bring the pod closer to what is wanted, at most one per name. The same picture gives the same actions."""
    actions: list[Action] = []
    blocked = {*seen.busy, *seen.held_back}
    absent: list[WantedAdapter] = []

    for adapter in wanted.adapters:
        name = adapter.engine_name
        there = seen.on_disk.get(name)
        if there is None or there.digest != adapter.digest:
            absent.append(adapter)  # also where it is loaded: an evicted adapter is read again from its path
            if name not in seen.sizes and name not in blocked:
                actions.append(Inspect(adapter))
        if name in blocked:
            continue
        if seen.engine is not None and name in seen.engine and not loaded(adapter, seen.engine, adapters_dir):
            actions = [action for action in actions if action.name != name]
            actions.append(Unload(name))  # another path under our name: not the files that were verified
        elif (
            there is not None and there.digest == adapter.digest and seen.engine is not None and name not in seen.engine
        ):
            actions.append(Load(adapter))

    taken = {action.name for action in actions}
    actions += [action for action in _on_disk(wanted, seen, absent) if action.name not in taken]
    if seen.engine is not None:  # else what the engine still uses is unknown: take nothing away
        leaving = unwanted_in_engine(wanted, seen.engine)
        actions += [Unload(name) for name in leaving if name in seen.drained and name not in blocked]
    return actions


def _on_disk(wanted: Wanted, seen: Observed, absent: list[WantedAdapter]) -> list[Action]:
    """Downloads that have room, refusals of those that have none, and what goes to make room."""
    names = {adapter.engine_name for adapter in wanted.adapters}
    blocked = {*seen.busy, *seen.held_back}
    asked = [
        Asked(
            name=adapter.engine_name,
            size=seen.sizes.get(adapter.engine_name),
            placed=adapter.engine_name in seen.partial or adapter.engine_name in seen.busy,
            waiting=adapter.engine_name in blocked,
            failed=adapter.engine_name in seen.failed,
        )
        for adapter in absent
    ]
    by_name = {adapter.engine_name: adapter for adapter in absent}
    kept = {
        name: Kept(folder.size_bytes, folder.used_at)
        for name, folder in seen.on_disk.items()
        if name not in names and seen.engine is not None and name not in seen.engine and name not in blocked
    }
    held = sum(folder.size_bytes for name, folder in seen.on_disk.items() if name not in kept and name not in by_name)
    soon = sum(folder.size_bytes for name, folder in seen.on_disk.items() if name not in names and name not in kept)
    coming = {adapter.engine_name: adapter for adapter in wanted.expected if adapter.engine_name not in names}
    # What is on its way before it is wanted ends as soon as something that is wanted is missing; until then it takes its room.
    early = sum(seen.sizes.get(name, 0) for name in coming if name in seen.partial or name in seen.busy)
    share = share_out(asked, kept, held + early, soon + early, seen.capacity)
    missing = [name for name in by_name if name not in seen.failed]
    staying = by_name if missing else by_name | coming
    return [
        *(Download(by_name[name]) for name in share.fetch),
        *(Refuse(name, message) for name, message in share.refuse.items()),
        *(Delete(name) for name in share.evict if not seen.deleting),
        *(Discard(name) for name in sorted(seen.partial) if name not in staying and name not in blocked),
        *([] if missing or share.evict else _ahead(coming, seen, blocked)),
    ]


def _ahead(coming: Mapping[str, WantedAdapter], seen: Observed, blocked: Collection[str]) -> list[Action]:
    """What is brought before it is wanted, when nothing that is wanted is missing: one at a time, and only into room that
    nobody else uses."""
    if any(name in seen.busy for name in coming):
        return []
    parts = {name: seen.sizes.get(name, 0) for name in coming if name in seen.partial}
    there = sum(folder.size_bytes for folder in seen.on_disk.values()) + sum(parts.values())
    for name, adapter in coming.items():
        if name in blocked or name in seen.on_disk:
            continue
        size = seen.sizes.get(name)
        if size is None:
            return [Inspect(adapter, expected=True)]
        if there + (0 if name in parts else size) <= min(seen.capacity.kept, seen.capacity.total):
            return [Download(adapter)]
    return []
