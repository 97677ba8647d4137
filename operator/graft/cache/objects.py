"""The objects of one kind in a compact form, each in its newest version that is known. It sends no request.

An object is compressed JSON, and is parsed at each read. So no reader can change it, and 10,000 objects need a few MiB.
Versions are compared: "resourceVersions of one kind can be compared as integers" (Kubernetes, API concepts). Answers
to writes, events and lists may arrive in any order, and an older version never replaces a newer one.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from sys import intern
from typing import Any

from graft.manifests.metadata import OWNER_UID, Manifest

TOMBSTONE = 600.0  # seconds; no request of the operator takes longer, so no older answer arrives after that
DICTIONARY = 2**15  # bytes; zlib looks back no further
Place = tuple[str, str]  # namespace ("" for kinds without namespaces) and name


class Held:
    """One object: its version, the values that are found without parsing it, and its compressed JSON."""

    __slots__ = ("data", "facts", "generation", "group", "owner", "uid", "version")

    def __init__(
        self, version: int, uid: str, generation: int, owner: str, group: str, facts: Any, data: bytes
    ) -> None:
        self.version = version
        self.uid = uid
        self.generation = generation
        self.owner = owner
        self.group = group
        self.facts = facts
        self.data = data


@dataclass(frozen=True)
class Change:
    """One object that was created, changed or deleted. It is parsed once, and only if it is asked for: do not change it."""

    kind: str
    place: Place
    before: Held | None
    after: Held | None
    unpack: Callable[[Held], Manifest]

    @property
    def uid(self) -> str:
        held = self.after or self.before
        return held.uid if held is not None else ""

    @cached_property
    def old(self) -> Manifest | None:
        return None if self.before is None else self.unpack(self.before)

    @cached_property
    def new(self) -> Manifest | None:
        return None if self.after is None else self.unpack(self.after)


class Packing:
    """Compresses JSON. The first object is the dictionary of the others, because objects of a kind are much alike."""

    def __init__(self) -> None:
        self._dictionary = b""

    def pack(self, item: Manifest) -> bytes:
        text = json.dumps(item, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
        if not self._dictionary:
            self._dictionary = text[-DICTIONARY:]
        packer = zlib.compressobj(level=3, zdict=self._dictionary)
        return packer.compress(text) + packer.flush()

    def unpack(self, data: bytes) -> Manifest:
        text = zlib.decompressobj(zdict=self._dictionary).decompress(data)
        return dict(json.loads(text.decode(errors="surrogatepass")))


class Objects:
    """The objects of one kind, found by namespace, by owner and by group.

    `group`: the group of an object, for example its adapter; "" for none. `facts`: values of an object that are read often.
    """

    def __init__(
        self,
        kind: str,
        group: Callable[[Manifest], str] | None = None,
        facts: Callable[[Manifest], Any] | None = None,
    ) -> None:
        self.kind = kind
        self._group = group
        self._facts = facts
        self._packing = Packing()
        self._held: dict[str, dict[str, Held]] = {}  # namespace -> name -> object
        self._owners: dict[str, tuple[Place, ...]] = {}  # UID of the owner -> its objects
        self._groups: dict[tuple[str, str], dict[str, None]] = {}  # namespace and group -> names
        self._deleted: dict[Place, tuple[int, float]] = {}  # -> version of the deletion, and when it was noticed

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def get(self, namespace: str | None, name: str) -> Held | None:
        return self._held.get(namespace or "", {}).get(name)

    def facts(self, place: Place) -> Any:
        """Return the facts of the object. None if it is not held."""
        held = self.get(*place)
        return None if held is None else held.facts

    def unpack(self, held: Held) -> Manifest:
        return self._packing.unpack(held.data)

    def places(
        self, namespace: str | None = None, *, owner: str | None = None, group: str | None = None
    ) -> list[Place]:
        """Return where the objects of a namespace (None: of all), of an owner or of a group are."""
        if owner is not None:
            return [place for place in self._owners.get(owner, ()) if namespace in {None, place[0]}]
        spaces = self._held if namespace is None else [namespace]
        if group is not None:
            return [(space, name) for space in spaces for name in self._groups.get((space, group), ())]
        return [(space, name) for space in spaces for name in self._held.get(space, ())]

    def put(self, item: Manifest) -> Change | None:
        """Take an object. Return the change, or None if this version or a newer one is known."""
        metadata = item["metadata"]
        place, version = place_of(item), version_of(item)
        before = self.get(*place)
        if before is not None and version <= before.version:
            return None
        if version <= self._deleted.get(place, (0, 0.0))[0]:
            return None
        held = Held(
            version,
            intern(str(metadata.get("uid", ""))),
            int(metadata.get("generation") or 0),
            intern(str((metadata.get("labels") or {}).get(OWNER_UID, ""))),
            intern(self._group(item)) if self._group is not None else "",
            self._facts(item) if self._facts is not None else None,
            self._packing.pack(item),
        )
        self._index(place, before, held)
        return Change(self.kind, place, before, held, self.unpack)

    def remove(self, place: Place, version: int) -> Change | None:
        """Take a deletion. Return the change, or None if the object is not known, or is known in a newer version."""
        before = self.get(*place)
        if before is not None and before.version > version:
            return None
        self._bury(place, version)
        if before is None:
            return None
        self._index(place, before, None)
        return Change(self.kind, place, before, None, self.unpack)

    def remove_others(self, listed: set[Place], version: int, among: list[Place]) -> Iterator[Change]:
        """Remove those of the objects `among` that a list of this version does not have. Yield the changes."""
        for place in among:
            if place not in listed and (change := self.remove(place, version)) is not None:
                yield change

    def forget_versions(self) -> None:
        """Accept older versions from now on: the API server's store was restored from a backup."""
        self._deleted.clear()
        for names in self._held.values():
            for held in names.values():
                held.version = 0

    def _index(self, place: Place, before: Held | None, after: Held | None) -> None:
        namespace, name = intern(place[0]), intern(place[1])
        same = before is not None and after is not None and (before.owner, before.group) == (after.owner, after.group)
        if before is not None and not same:
            self._unindex(namespace, name, before)
        names = self._held.setdefault(namespace, {})
        if after is None:
            names.pop(name, None)
            if not names:
                del self._held[namespace]
            return
        names[name] = after
        if same:
            return
        if after.owner:
            self._owners[after.owner] = (*self._owners.get(after.owner, ()), (namespace, name))
        if after.group:
            self._groups.setdefault((namespace, after.group), {})[name] = None

    def _unindex(self, namespace: str, name: str, held: Held) -> None:
        if held.owner:
            left = tuple(item for item in self._owners.get(held.owner, ()) if item != (namespace, name))
            if left:
                self._owners[held.owner] = left
            else:
                self._owners.pop(held.owner, None)
        if held.group and (members := self._groups.get((namespace, held.group))) is not None:
            members.pop(name, None)
            if not members:
                del self._groups[namespace, held.group]

    def _bury(self, place: Place, version: int) -> None:
        now = time.monotonic()
        self._deleted.pop(place, None)
        self._deleted[place] = (version, now)
        while (oldest := next(iter(self._deleted))) != place and now - self._deleted[oldest][1] > TOMBSTONE:
            del self._deleted[oldest]


def place_of(item: Manifest) -> Place:
    """Return the namespace and the name of an object (PURE)."""
    return item["metadata"].get("namespace") or "", item["metadata"]["name"]


def version_of(item: Manifest) -> int:
    """Return the resourceVersion of an object (PURE)."""
    return int(item["metadata"]["resourceVersion"])
