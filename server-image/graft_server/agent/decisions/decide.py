"""Decide the next actions from the wanted adapters and the observed state (PURE)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from graft.contracts.agent import Wanted, WantedAdapter

from graft_server.agent.decisions.room import Asked, Capacity, Kept, share_out

# <tenant>--<adapter resource>--<digest12>. It is also the name of a folder, so it cannot contain a slash.
OUR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*--(?P<adapter>[A-Za-z0-9._-]+)--(?P<digest>[0-9a-f]{12})")


@dataclass(frozen=True)
class Inspect:
    """Read a version's manifest: its size, and whether it can be served. An expected version is not signed yet."""

    adapter: WantedAdapter
    expected: bool = False

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Download:
    """Download and verify a version, and rename its folder to the engine name."""

    adapter: WantedAdapter

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Load:
    """Load a complete version into the engine."""

    adapter: WantedAdapter

    @property
    def name(self) -> str:
        return self.adapter.engine_name


@dataclass(frozen=True)
class Unload:
    """Unload an adapter from the engine."""

    name: str


@dataclass(frozen=True)
class Delete:
    """Delete the files of a version that was kept for a fast rollback."""

    name: str


@dataclass(frozen=True)
class Discard:
    """Delete the unfinished download of a version that is no longer wanted."""

    name: str


@dataclass(frozen=True)
class Refuse:
    """Report that an adapter does not fit on the disk."""

    name: str
    message: str


Action = Inspect | Download | Load | Unload | Delete | Discard | Refuse


@dataclass(frozen=True)
class OnDisk:
    """A complete folder. `used_at` is in seconds since the epoch."""

    digest: str
    size_bytes: int = 0
    used_at: float = 0.0


@dataclass(frozen=True)
class Observed:
    """The observed state. All names are engine names.

    `on_disk`: complete folders. `engine`: models that the engine lists, name -> root path; None while it does not
    answer. `busy`: names for which an action runs. `held_back`: names whose last action failed and whose retry is not
    due. `failed`: names with a failure. `drained`: names that no request has used for the drain time. `sizes`: bytes of
    the inspected versions. `partial`: names with an unfinished download on disk. `capacity`: bytes that the disk may
    hold. `unchecked`: names that the engine may list and that are not known to work. `deleting`: a kept version is being deleted and may still be in `on_disk`.
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
    unchecked: Collection[str] = ()


def path_of(adapters_dir: str, name: str) -> str:
    """Return where the engine finds the adapter. Each version has its own name, and so its own path."""
    return f"{adapters_dir.rstrip('/')}/{name}"


def unwanted_in_engine(wanted: Wanted, engine: Mapping[str, str]) -> list[str]:
    """Return the adapters with our naming that the engine has loaded and that are not wanted. They drain."""
    names = {adapter.engine_name for adapter in wanted.adapters}
    return sorted(name for name in engine if OUR_NAME.fullmatch(name) and name not in names)


def loaded(adapter: WantedAdapter, engine: Mapping[str, str] | None, adapters_dir: str) -> bool:
    """Return whether the engine has loaded exactly these files."""
    return engine is not None and engine.get(adapter.engine_name) == path_of(adapters_dir, adapter.engine_name)


def decide(wanted: Wanted, seen: Observed, adapters_dir: str) -> list[Action]:
    """Return the actions that bring the pod closer to the wanted adapters, at most one per name (deterministic)."""
    actions: list[Action] = []
    blocked = {*seen.busy, *seen.held_back}
    absent: list[WantedAdapter] = []

    for adapter in wanted.adapters:
        name = adapter.engine_name
        there = seen.on_disk.get(name)
        if there is None or there.digest != adapter.digest:
            absent.append(adapter)  # even if it is loaded: after a cache eviction, the engine reads the files again
            if name not in seen.sizes and name not in blocked:
                actions.append(Inspect(adapter))
        if name in blocked:
            continue
        if seen.engine is not None and name in seen.engine and not loaded(adapter, seen.engine, adapters_dir):
            actions = [action for action in actions if action.name != name]
            actions.append(Unload(name))  # our name with another path: these are not the verified files
        elif (
            there is not None
            and there.digest == adapter.digest
            and seen.engine is not None
            and (name not in seen.engine or name in seen.unchecked)  # a killed agent has loaded it and not checked it
        ):
            actions.append(Load(adapter))

    taken = {action.name for action in actions}
    actions += [action for action in _on_disk(wanted, seen, absent) if action.name not in taken]
    if seen.engine is not None:  # if it does not answer, the loaded adapters are unknown, so none is unloaded
        leaving = unwanted_in_engine(wanted, seen.engine)
        actions += [Unload(name) for name in leaving if name in seen.drained and name not in blocked]
    return actions


def _on_disk(wanted: Wanted, seen: Observed, absent: list[WantedAdapter]) -> list[Action]:
    """Return the downloads that fit on the disk, refusals of those that do not fit, and deletions that free space."""
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
    # The download of an expected version stops as soon as a wanted adapter is missing. Until then its bytes count.
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
    """Return the next action for an expected version: one version at a time, and only into unused disk space.

    The caller makes sure that no wanted adapter is missing.
    """
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
