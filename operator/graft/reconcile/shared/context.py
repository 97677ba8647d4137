"""What every reconciler uses: the API server, the store and the settings.

It also writes statuses, Events and finalizers.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from graft import status as conditions
from graft.api.meta import Condition, Resource, Status
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.signing import Keys
from graft.artifacts.store import S3Store
from graft.cache.cache import Cache
from graft.kube import Kube, KubeError, Manifest
from graft.manifests.metadata import FINALIZER
from graft.reconcile.shared.backoff import Backoff
from graft.reconcile.shared.folders import Folders
from graft.reconcile.shared.news import News, transitions
from graft.reconcile.shared.transfers import Transfer, Transfers
from graft.reconcile.shared.verified import Verified
from graft.settings import Settings
from graft.undeclared import Undeclared
from graft.work.places import Locks, away
from graft.work.storecalls import StoreCalls
from graft.work.turns import Turns

log = logging.getLogger(__name__)
T = TypeVar("T")

SOON = 5.0  # seconds until the next reconcile while work is in progress
THREADS = 16  # for calls of other services than the store
PLANNERS = 2  # threads for pure computations that take long; more would only slow the event loop down
GATHER = 3.0  # seconds in which changes of a status that are no transition are gathered into one write
MOST_WRITTEN = 10_000  # statuses whose last write is remembered
WAITING = 20.0  # seconds until the next reconcile while the operator waits for something that it does not control


@dataclass
class Context:
    """The state that all reconcilers of one operator process share."""

    kube: Kube
    settings: Settings
    store: S3Store
    identity: VersityIdentity | None
    brief: S3Store | None = None  # the same store with short timeouts, for `stored`; None: `store`
    elected: bool = False  # whether this operator leads others, one of which may have written until a moment ago
    store_calls: StoreCalls = field(default_factory=StoreCalls)
    locks: Locks = field(default_factory=Locks)
    keys: Keys | None = None  # set by reconcile/adapter/signing.py; None until they have been read
    keys_trouble: str = "the operator has not read them yet"  # why `keys` is None
    # The root keys of the gateways by name, set by reconcile/adapterdeployment/callers.py; None until they have been read
    gateway_roots: dict[str, bytes] | None = field(default=None, repr=False)
    gateway_roots_trouble: str = "the operator has not read them yet"
    transfers: Transfers = field(default_factory=Transfers)
    verified: Verified = field(default_factory=Verified)
    backoff: Backoff = field(default_factory=Backoff)
    planning: Turns = field(default_factory=lambda: Turns(PLANNERS, 1))
    planners: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PLANNERS, "planning"))
    wake: Callable[[str, str, str], None] = lambda kind, namespace, name: (
        None
    )  # reconcile a resource soon; see Queue.wake
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "blocking"))
    issued: dict[str, str] = field(default_factory=dict)  # namespace -> resourceVersion of its Secret that is right
    recorded: set[str] = field(
        default_factory=set
    )  # UIDs of the Tenants' namespaces whose part of the bucket is recorded
    reading: dict[str, asyncio.Future[Manifest | None]] = field(default_factory=dict)  # namespace -> read of its Secret
    folders: Folders = field(default_factory=Folders)
    reports: dict[str, Any] = field(
        default_factory=dict
    )  # UID of a job -> what its pods reported last, see finetunejob
    news: News = field(init=False)
    undeclared: Undeclared = field(default_factory=Undeclared)
    written: dict[str, float] = field(default_factory=dict)  # UID -> time.monotonic() of the last write of its status

    cache: Cache | Any = None  # what reconciles read; without one, they read from the API server

    def __post_init__(self) -> None:
        self.news = News(self.kube)
        self.cache = self.cache or Cache(self.kube)

    async def stored(self, namespace: str, call: Callable[..., T], *arguments: Any) -> T:
        """Make a short call of the store: `call` gets the store and the arguments. The reconcile holds no place meanwhile.

        `namespace`: the tenant for which the store is asked, or "" for the operator itself. While the store does not
        answer, the call fails at once (graft/work/storecalls.py). Use `transfer` for long work. Raises StoreError.
        """
        return await self.store_calls.run(namespace, call, self.brief or self.store, *arguments)

    async def blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call of another service than the store in a thread. The reconcile holds no place meanwhile."""
        async with away():
            return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: call(*arguments))

    async def computed(self, namespace: str, call: Callable[..., T], *arguments: Any) -> T:
        """Run a pure computation that takes long in a thread, so that the event loop does not wait."""
        async with away(), self.planning.turn(namespace):
            return await asyncio.get_running_loop().run_in_executor(self.planners, lambda: call(*arguments))

    def transfer(self, resource: Resource, what: str, call: Callable[..., Any], *arguments: Any) -> Transfer | None:
        """Return the resource's work of this kind if it is done, once. Its result() raises what the call raised.

        Otherwise return None: the work is started, waits, runs, was interrupted, or must wait until other work of the
        resource has stopped. The resource is reconciled again when the work has ended.
        """
        meta, kind = resource.metadata, type(resource).__name__
        found = self.transfers.find(meta.uid)
        if found is None or found.what != what:
            if self.transfers.forget(meta.uid):
                self.transfers.start(
                    meta.uid, what, call, *arguments,
                    namespace=meta.namespace, then=lambda: self.wake(kind, meta.namespace, meta.name),
                )  # fmt: skip
            return None
        if not found.done:
            return None
        self.transfers.forget(meta.uid)
        return None if found.interrupted else found

    async def write_status(
        self,
        raw: Manifest,
        status: Status,
        observed: list[Condition],
        *,
        hurry: bool = True,
        unchanged: bool = False,
    ) -> float | None:
        """Write the status if it differs from the present one, with an Event for each transition.

        Without `hurry`, a status with the same stage, reasons and generation is written at the earliest GATHER seconds
        after the last one. Return the seconds until then, or None if nothing is left to write.

        Raises KubeError with status 409 if the resource has changed since it was read: its status is the memory of its
        reconciles, so one that was computed from an older status must not replace it. If the resource was deleted,
        nothing happens, or with `unchanged`, KubeError with status 404 is raised.
        """
        metadata = raw["metadata"]
        generation, uid = metadata.get("generation", 0), metadata["uid"]
        before = raw.get("status") or {}
        old = [Condition.model_validate(item) for item in before.get("conditions", [])]
        at = conditions.now()
        merged = conditions.merge(old, conditions.with_kstatus(observed), generation, at)
        new = status.model_copy(update={"conditions": merged, "observed_generation": generation})
        after = new.model_dump(mode="json", by_alias=True, exclude_none=True)
        if before in (after, self.undeclared.without(raw["kind"], after)):
            return None
        changed = conditions.transitions(old, merged)
        same = not changed and all(before.get(name) == after.get(name) for name in ("stage", "observedGeneration"))
        left = self.written.get(uid, -GATHER) + GATHER - time.monotonic()
        if not hurry and same and left > 0:
            return left
        for item in changed:
            fields = {"type": item.type, "status": item.status, "reason": item.reason}
            log.info("condition", extra={"resource": _name(raw)} | fields)
        found = transitions(raw, old, merged, at)
        await self.news.report(item for item in found if item.settled)
        try:
            await self.undeclared.apply(
                raw["kind"], after,
                lambda part: self.kube.apply_status(
                    raw["kind"], raw["apiVersion"], metadata.get("namespace"), metadata["name"], uid, part,
                    resource_version=str(metadata.get("resourceVersion") or ""),
                ),
            )  # fmt: skip
        except KubeError as error:
            if unchanged or error.status != 404:
                raise
            return None  # it was deleted meanwhile
        self.news.later(item for item in found if not item.settled)
        if len(self.written) >= MOST_WRITTEN:
            self.written.clear()
        self.written[uid] = time.monotonic()
        return None

    async def claim(
        self, raw: Manifest, labels: dict[str, str], annotations: dict[str, str] | None = None
    ) -> Manifest | None:
        """Set the finalizer, so that a deletion waits for the clean-up, and these labels and annotations, in one write.

        Return the resource as it is then, or None if it is deleted meanwhile. If it has all of them already, or is being
        deleted, nothing is written.
        """
        metadata = raw["metadata"]
        finalizers, named = metadata.get("finalizers") or [], {"labels": labels, "annotations": annotations or {}}
        present = all(part.items() <= (metadata.get(name) or {}).items() for name, part in named.items())
        if metadata.get("deletionTimestamp") or (FINALIZER in finalizers and present):
            return raw
        wanted = named | {"finalizers": list(dict.fromkeys([*finalizers, FINALIZER]))}
        version = {"resourceVersion": metadata.get("resourceVersion"), "uid": metadata["uid"]}
        patch = {"metadata": wanted | version}
        return await self.kube.merge_patch(raw["kind"], metadata.get("namespace"), metadata["name"], patch)

    async def remove_finalizer(self, resource: Resource, kind: str) -> None:
        """Remove the finalizer after the clean-up, so that the API server can delete the resource."""
        meta = resource.metadata
        if FINALIZER in meta.finalizers:
            left = [item for item in meta.finalizers if item != FINALIZER]
            patch = {"metadata": {"finalizers": left, "resourceVersion": meta.resource_version, "uid": meta.uid}}
            await self.kube.merge_patch(kind, meta.namespace or None, meta.name, patch)


def _name(raw: Manifest) -> str:
    metadata = raw["metadata"]
    return f"{raw['kind']} {metadata.get('namespace', '')}/{metadata['name']}"
