"""What to do next, from what is wanted and what is there (PURE)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from graft.contracts import Wanted, WantedAdapter

# <tenant>--<adapter resource>--<digest12>. It also becomes a folder's name, so it can hold no slash.
OUR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*--(?P<adapter>[A-Za-z0-9._-]+)--(?P<digest>[0-9a-f]{12})")


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
    """Remove the files of an adapter."""

    name: str


Action = Download | Load | Unload | Delete


@dataclass(frozen=True)
class Observed:
    """What is there now.

    `on_disk`: complete folders, engine name -> manifest digest. `engine`: what the engine lists, name -> root path; None while
    it does not answer. `busy`: names that an action is running for. `held_back`: names whose last action failed and whose time
    to try again has not come. `drained`: names that no request has used for the drain time.
    """

    on_disk: Mapping[str, str]
    engine: Mapping[str, str] | None
    busy: Collection[str] = ()
    held_back: Collection[str] = ()
    drained: Collection[str] = ()


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
    names = {adapter.engine_name for adapter in wanted.adapters}

    for adapter in wanted.adapters:
        name = adapter.engine_name
        if name in seen.busy or name in seen.held_back:
            continue
        if seen.engine is not None and name in seen.engine and not loaded(adapter, seen.engine, adapters_dir):
            actions.append(Unload(name))  # another path under our name: not the files that were verified
        elif seen.on_disk.get(name) != adapter.digest:
            actions.append(Download(adapter))  # also where it is loaded: an evicted adapter is read again from its path
        elif seen.engine is not None and name not in seen.engine:
            actions.append(Load(adapter))

    if seen.engine is None:
        return actions  # what the engine still uses is unknown: take nothing away
    blocked = {*seen.busy, *seen.held_back}
    for name in unwanted_in_engine(wanted, seen.engine):
        if name in seen.drained and name not in blocked:
            actions.append(Unload(name))
    for name in sorted(seen.on_disk):
        if name not in names and name not in seen.engine and name not in blocked:
            actions.append(Delete(name))
    return actions
