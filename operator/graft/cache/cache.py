"""The objects that the operator follows, for its reconciles. It reads and holds them, and it writes nothing.

`get` and `list` have the signatures of Kube's. What the operator has written is known at once: the answer of each write
comes here. What others write arrives as an event, and wakes who needs it. So a decision that cannot be taken back is
made with `fresh` or with Kube itself: the last look before files are deleted, and Secrets.

A kind that is not followed, or whose first list has not arrived, is read from the API server.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from graft.cache.bodies import Bodies
from graft.cache.informer import Informer, Source
from graft.cache.objects import Change, Objects, Place, place_of, version_of
from graft.kube import Kube, Manifest, owned_by
from graft.manifests.metadata import OWNER_UID

KEPT_PREFIX = "graft.dev/"  # of the labels and annotations that are held of metadata
# `list` is a method here.
Manifests: TypeAlias = list[Manifest]
Facts: TypeAlias = list[Any]
Tasks: TypeAlias = list[asyncio.Task[None]]
AT_ONCE = 16  # objects that one list reads at the same time


class Followed:
    """The objects of one source, and how they are received."""

    def __init__(self, source: Source, bodies: Bodies, cache: "Cache") -> None:
        self.source = source
        self.objects = Objects(source.kind, source.group, source.facts)
        self._bodies = bodies
        self._cache = cache

    @property
    def whole(self) -> bool:
        """Whether the whole objects are held, and not only their metadata."""
        return self.source.listed

    def received(self, item: Manifest, *, whole: bool) -> None:
        place, version = place_of(item), version_of(item)
        if not self._cache.belongs(self.source, item):
            self._drop(place, version)
            return
        if self.whole and not whole:
            raise ValueError(f"{self.source.key}: the whole object is needed")
        change = self.objects.put(item if self.whole else essential(item, every_label=self.source.every_label))
        held = self.objects.get(*place)
        if not self.whole and whole and held is not None and held.version == version:
            self._bodies.put(self.source.kind, place, version, item)
        self._tell(change)

    def deleted(self, item: Manifest) -> None:
        self._drop(place_of(item), version_of(item))

    def listed(self, places: set[Place], version: int) -> None:
        self.compared(places, version, self.objects.places())

    def compared(self, places: set[Place], version: int, among: list[Place]) -> None:
        """Note which of the objects `among` a list of this version did not have."""
        for change in self.objects.remove_others(places, version, among):
            self._bodies.forget(self.source.kind, change.place)
            self._tell(change)

    def restored(self) -> None:
        self.objects.forget_versions()

    def written(self, item: Manifest) -> None:
        """Take the answer of a write or a read of the operator."""
        metadata = item["metadata"]
        if self.source.only is not None and place_of(item) != self.source.only:
            return
        if self.whole and metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self.deleted(item)  # the last finalizer was removed, and with it the object
        else:
            self.received(item, whole=True)

    def body(self, place: Place) -> Manifest | None:
        """Return the object if it is held as a whole."""
        held = self.objects.get(*place)
        if held is None:
            return None
        return self.objects.unpack(held) if self.whole else self._bodies.get(self.source.kind, place, held.version)

    def _drop(self, place: Place, version: int) -> None:
        change = self.objects.remove(place, version)
        if change is not None:
            self._bodies.forget(self.source.kind, place)
        self._tell(change)

    def _tell(self, change: Change | None) -> None:
        if change is not None:
            self._cache.changed(self.source, change)


class Cache:
    """What the operator knows of one cluster.

    `belongs`: whether an object that carries the labels of a source is Graft's. `changed`: called for each change.
    """

    def __init__(
        self,
        kube: Kube,
        sources: Iterable[Source] = (),
        belongs: Callable[[Source, Manifest], bool] = lambda source, item: True,
        changed: Callable[[Source, Change], None] = lambda source, change: None,
    ) -> None:
        self._kube = kube
        self.belongs = belongs
        self.changed = changed
        bodies = Bodies()
        self._followed = {source.key: Followed(source, bodies, self) for source in sources}
        self.informers = {key: Informer(kube, item.source, item) for key, item in self._followed.items()}
        if self._followed:
            kube.answered, kube.live = self._answered, self._live

    def start(self) -> Tasks:
        """Begin to list and watch. Return the tasks, which never end by themselves."""
        return [asyncio.create_task(item.run(), name=f"watch {key}") for key, item in self.informers.items()]

    async def synced(self) -> None:
        """Wait until every kind was listed once."""
        await asyncio.gather(*(informer.synced.wait() for informer in self.informers.values()))

    def age(self, key: str) -> float:
        """Return the seconds since the API server last answered the watch of a source."""
        return time.monotonic() - self.informers[key].seen

    def ages(self) -> dict[str, float]:
        """Return the seconds since the API server last answered each watch."""
        return {key: self.age(key) for key in self.informers}

    def missing(self) -> Sequence[str]:
        """Return the sources whose first list has not arrived."""
        return [key for key, item in self.informers.items() if not item.synced.is_set()]

    def objects(self, key: str) -> Objects:
        """Return what is held of a source."""
        return self._followed[key].objects

    async def get(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """Return the object, or None if it does not exist."""
        followed = self._ready(kind)
        if followed is None:
            return await self._kube.get(kind, namespace, name)
        place = (namespace or "", name)
        if followed.objects.get(*place) is None and not followed.source.labels:
            return None
        # Without the label, an object of this name may exist all the same.
        return followed.body(place) or await self._kube.get(kind, namespace, name)

    async def list(
        self,
        kind: str,
        namespace: str | None = None,
        labels: dict[str, str] | None = None,
        *,
        owner: str | None = None,
        metadata_only: bool = False,
    ) -> Manifests:
        """Return all objects with these labels. With `owner`, only those that the object with this UID controls."""
        followed = self._ready(kind)
        if followed is None or (followed.source.labels and OWNER_UID not in (labels or {})):
            return await self._kube.list(kind, namespace, labels, owner=owner, metadata_only=metadata_only)
        objects = followed.objects
        places = objects.places(namespace, owner=(labels or {}).get(OWNER_UID))
        if metadata_only or followed.whole:
            held = [item for place in places if (item := objects.get(*place)) is not None]
            found = [objects.unpack(item) for item in held]
        else:
            found = await self._bodies(followed, places)
        return [item for item in found if _has(item, labels) and (owner is None or owned_by(item, owner))]

    async def facts(
        self, kind: str, namespace: str, group: str, of: Callable[[Manifest], str], facts: Callable[[Manifest], Any]
    ) -> Facts:
        """Return the facts of the objects of a group, which are not parsed for it. `of`, `facts`: as in the kind's Source."""
        followed = self._ready(kind)
        if followed is None:
            return [facts(item) for item in await self._kube.list(kind, namespace) if of(item) == group]
        assert followed.source.group is of and followed.source.facts is facts  # noqa: S101
        held = [followed.objects.get(*place) for place in followed.objects.places(namespace, group=group)]
        return [item.facts for item in held if item is not None]

    async def every(self, kind: str, facts: Callable[[Manifest], Any], namespace: str | None = None) -> Facts:
        """Return the facts of all objects of a kind, which are not parsed for it. `facts`: as in the kind's Source."""
        followed = self._ready(kind)
        if followed is None:
            return [facts(item) for item in await self._kube.list(kind, namespace)]
        assert followed.source.facts is facts  # noqa: S101
        return [followed.objects.facts(place) for place in followed.objects.places(namespace)]

    def may_have_children(self, kind: str, owner: str) -> bool:
        """Return whether objects of a kind may exist that carry the label of this owner, a UID. No request is sent."""
        followed = self._ready(kind)
        return followed is None or bool(followed.objects.places(owner=owner))

    async def metadata(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """Return the metadata of an object, or None if it does not exist. It is not requested if the kind is followed."""
        followed = self._ready(kind)
        if followed is None:
            found = await self._kube.get(kind, namespace, name)
        else:
            held = followed.objects.get(namespace, name)
            found = None if held is None else followed.objects.unpack(held)
        return None if found is None else dict(found["metadata"])

    async def fresh(
        self,
        kind: str,
        namespace: str,
        labels: dict[str, str] | None = None,
        *,
        owner: str | None = None,
        metadata_only: bool = False,
    ) -> Manifests:
        """List from the API server, and correct what is held. For decisions that cannot be taken back."""
        followed = self._ready(kind)
        if followed is None:
            return await self._kube.list(kind, namespace, labels, owner=owner, metadata_only=metadata_only)
        found: Manifests = []
        version = ""
        async for page in self._kube.pages(kind, namespace, labels or {}, metadata_only=metadata_only):
            found, version = found + page.items, page.version
        whole = not metadata_only
        if whole or not followed.whole:
            for item in found:
                followed.received(item, whole=whole)
        places = followed.objects.places(namespace, owner=(labels or {}).get(OWNER_UID))
        among = [place for place in places if self._matches(followed, place, labels)]
        followed.compared({place_of(item) for item in found}, int(version), among)
        return [item for item in found if owner is None or owned_by(item, owner)]

    async def relist(self, *kinds: str) -> None:
        """List from the API server what is followed of these kinds, and correct what is held. Raises KubeError."""
        for kind in kinds:
            followed, places, version = self._followed[kind], set[Place](), ""
            whole = followed.source.listed
            async for page in self._kube.pages(kind, labels=followed.source.labels, metadata_only=not whole):
                version = page.version
                for item in page.items:
                    places.add(place_of(item))
                    followed.received(item, whole=whole)
            followed.listed(places, int(version))

    def _matches(self, followed: Followed, place: Place, labels: dict[str, str] | None) -> bool:
        held = followed.objects.get(*place)
        return held is not None and (not labels or _has(followed.objects.unpack(held), labels))

    def _ready(self, kind: str) -> Followed | None:
        followed = self._followed.get(kind)
        return followed if followed is not None and self.informers[kind].synced.is_set() else None

    async def _bodies(self, followed: Followed, places: Iterable[Place]) -> Manifests:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(place: Place) -> Manifest | None:
            if (found := followed.body(place)) is not None:
                return found
            async with limit:
                return await self._kube.get(followed.source.kind, place[0] or None, place[1])

        found = await asyncio.gather(*map(one, places))
        return [item for item in found if item is not None]

    def _answered(self, kind: str, item: Manifest) -> None:
        for followed in self._followed.values():
            if followed.source.kind == kind:
                followed.written(item)

    async def _live(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """Return the object if it is held, else None: applying a manifest to an object that exists does no harm."""
        followed = self._ready(kind)
        if followed is not None and followed.objects.get(namespace or "", name) is None:
            return None
        return await self.get(kind, namespace, name)


def essential(item: Manifest, *, every_label: bool = False) -> Manifest:
    """Return the metadata by which an object's owner is found. Any user can make metadata of a megabyte (PURE).

    `every_label`: with the labels of others, too. Only for a kind that few users may write.
    """
    metadata = item["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp")
    labels = {
        key: text for key, text in (metadata.get("labels") or {}).items() if every_label or key.startswith(KEPT_PREFIX)
    }
    controllers = [found for found in metadata.get("ownerReferences") or [] if found.get("controller")]
    small: dict[str, Any] = {key: metadata[key] for key in kept if key in metadata}
    return {"metadata": small | {"labels": labels, "ownerReferences": controllers[:1]}}


def _has(item: Manifest, labels: dict[str, str] | None) -> bool:
    return not labels or labels.items() <= (item["metadata"].get("labels") or {}).items()


__all__ = ["Cache", "Change", "Source", "essential"]
