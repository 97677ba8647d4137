"""The only code that imports kopf: its watches of our kinds wake the reconcilers, its probes tell whether that works.

Handlers are low-level (`kopf.on.event`): no finalizers, annotations or progress of kopf's are ever written, so the only writes are the
reconcilers' own. Children are watched by kube.watch with a label selector that the API server evaluates: an operator that watched all
pods of a large cluster would spend most of its life on other people's.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import kopf
from prometheus_client import start_http_server

from graft import metrics
from graft.api import GROUP, VERSION
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.store import S3Store, StorageConfig, StoreError
from graft.contracts.gateway import DEMAND_COMPONENT, DEMAND_CONFIGMAP
from graft.contracts.mounts import STORAGE_DIR
from graft.kube import Kube, Manifest
from graft.manifests.adapter import JOB_UID
from graft.manifests.metadata import COMPONENT, OWNER_KIND, OWNER_NAME, OWNER_UID
from graft.reconcile import basemodel
from graft.reconcile.adapter import adapter, retention, signing, versions
from graft.reconcile.adapterdeployment import adapterdeployment, scaling
from graft.reconcile.finetunejob import finetunejob
from graft.reconcile.shared import access
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.queue import Queue
from graft.settings import load as load_settings

log = logging.getLogger(__name__)

CHILDREN = ("Job", "Pod", "Deployment", "ConfigMap")
STUCK_AFTER = 300.0  # seconds; a single look that takes longer hangs
METRICS_PORT = 9090

RECONCILERS: dict[str, Callable[[Context, str, str], Awaitable[float | None]]] = {
    "BaseModel": basemodel.reconcile,
    "FineTuneJob": finetunejob.reconcile,
    "Adapter": adapter.reconcile,
    "AdapterDeployment": adapterdeployment.reconcile,
}


class Operator:
    """What one process holds while it runs."""

    def __init__(self) -> None:
        self.ctx: Context | None = None
        self.queue: Queue | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.watching: dict[str, float] = {}  # child kind -> when its watch was last seen to work
        self.said: dict[
            tuple[str, str], set[retention.Said]
        ] = {}  # what the spec and status of each AdapterDeployment say


operator = Operator()


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Connect, make the bucket where that is ours to do, and follow the children."""
    settings.posting.enabled = False
    settings.watching.inactivity_timeout = 70  # a silent watch is reopened (kopf#204, #698)
    settings.watching.server_timeout = 300
    settings.networking.request_timeout = 30
    settings.persistence.finalizer = f"{GROUP}/kopf-unused"
    await _start_operator()


async def _start_operator() -> None:
    config = load_settings()
    store = await asyncio.to_thread(S3Store, StorageConfig.from_dir(os.environ.get("GRAFT_STORAGE_DIR", STORAGE_DIR)))
    identity = None
    if config.storage.issue_credentials:
        identity = VersityIdentity(store, config.storage.admin_url or store.config.endpoint)
    ctx = Context(await Kube.connect(), config, store, identity)
    await signing.refresh(ctx)
    operator.ctx = ctx
    operator.queue = Queue({kind: partial(reconcile, ctx) for kind, reconcile in RECONCILERS.items()})
    start_http_server(int(os.environ.get("GRAFT_METRICS_PORT", METRICS_PORT)))
    operator.tasks = [asyncio.create_task(_follow(kind), name=f"watch {kind}") for kind in CHILDREN]
    operator.tasks.append(asyncio.create_task(_follow_demand(), name="watch demand"))
    operator.tasks.append(asyncio.create_task(_housekeeping(), name="housekeeping"))
    operator.tasks.append(asyncio.create_task(_signing_keys(), name="signing keys"))


@kopf.on.cleanup()
async def stop(**_: Any) -> None:
    """End the workers; whatever they were doing is found again at the next start."""
    for task in operator.tasks:
        task.cancel()
    await asyncio.gather(*operator.tasks, return_exceptions=True)
    if operator.queue is not None:
        await operator.queue.stop()
    if operator.ctx is not None:
        operator.ctx.transfers.stop()
        await operator.ctx.kube.close()


@kopf.on.event(GROUP, VERSION, kopf.EVERYTHING)
async def changed(event: Any, body: kopf.Body, **_: Any) -> None:
    """One of our resources changed: look at it, and at those that refer to it."""
    queue = operator.queue
    if queue is None:
        return
    kind, meta = body["kind"], body["metadata"]
    namespace, name = meta.get("namespace") or "", meta["name"]
    metrics.WATCH_EVENTS.labels(kind).inc()
    if event.get("type") is None:  # the first listing after a start: not all at once
        await asyncio.sleep(random.uniform(0, 0.2))  # noqa: S311 - jitter
    if kind in RECONCILERS:
        if event.get("type") == "DELETED":
            queue.forget(kind, namespace, name)
        else:
            queue.wake(kind, namespace, name)
    for other in _referring(kind, dict(body), event.get("type")):
        queue.wake(*other)


def _referring(kind: str, body: Manifest, change: str | None) -> list[tuple[str, str, str]]:
    """Who else has to look when a resource changes. `change` is the event's type, None in a listing: nobody knows what has
    happened before it, what has been deleted least of all."""
    queue = operator.queue
    assert queue is not None  # noqa: S101
    namespace, own = body["metadata"].get("namespace") or "", body["metadata"]["name"]
    if kind == "BaseModel":
        return queue.keys("FineTuneJob") + queue.keys("AdapterDeployment") + queue.keys("Adapter")
    if kind == "Adapter":
        job = (body.get("spec", {}).get("job") or {}).get("name")
        made = JOB_UID in (body["metadata"].get("labels") or {})
        jobs = [key for key in queue.keys("FineTuneJob", namespace) if made and key[2] == job]
        adapter = body["spec"]["adapter"]  # what is the newest, and what a rollback leads to, may have changed
        siblings = [key for key in _versions(namespace, {adapter}) if key[2] != own]
        # What a composition waits for may be Archived, and is restored for it.
        parents = {ref.partition("@")[0] for ref in retention.composing([body]) if "@" in ref}
        users = [
            key
            for key in queue.keys("AdapterDeployment", namespace)
            if change is None or adapter in _adapters_in(operator.said.get((namespace, key[2]), set()))
        ]
        return jobs + siblings + _versions(namespace, parents) + users
    if kind == "AdapterDeployment":
        before = operator.said.pop((namespace, own), set())
        said: set[retention.Said] = set()
        if change != "DELETED":
            said = operator.said[namespace, own] = retention.said(body.get("spec")) | retention.said(body.get("status"))
        if change is None:
            return queue.keys("Adapter", namespace)
        # A version that is meant no more, or used no more, has to look as well, and so have those that lead to it.
        return _versions(namespace, _adapters_in(before ^ said))
    return []


def _adapters_in(said: set[retention.Said]) -> set[str]:
    """The adapters that any of these could name: as such, as a reference, or as a version (PURE)."""
    found = set()
    for _, text in said:
        name, _, version = text.rpartition("-")
        found.add(name if versions.parse(version) else text.partition("@")[0])
    return found


def _versions(namespace: str, adapters: set[str]) -> list[tuple[str, str, str]]:
    """The followed versions of these adapters."""
    assert operator.queue is not None  # noqa: S101
    return [key for key in operator.queue.keys("Adapter", namespace) if key[2].rpartition("-")[0] in adapters]


@kopf.on.event("", "v1", "namespaces")
async def namespace_changed(event: Any, name: str, **_: Any) -> None:
    """A namespace that is gone loses its key of the store."""
    if event.get("type") == "DELETED" and operator.ctx is not None:
        try:
            await access.revoke_orphans(operator.ctx)
        except StoreError as error:
            log.warning("keys of deleted namespaces not revoked, tried again later: %s", error)


async def _follow(kind: str) -> None:
    """Wake the owner of each child that changes. A watch that breaks is opened again; the resync covers the gap."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    async for event in ctx.kube.watch(kind, {OWNER_UID: None}):
        operator.watching[kind] = time.monotonic()
        if event is None:
            continue
        metrics.WATCH_EVENTS.labels(kind).inc()
        metadata = event["object"]["metadata"]
        labels = metadata.get("labels") or {}
        owner_kind, owner = labels.get(OWNER_KIND, ""), labels.get(OWNER_NAME, "")
        # Routes live in our own namespace and name their owner's in a label.
        namespace = labels.get("graft.dev/namespace") or metadata.get("namespace", "")
        if (owner_kind, namespace, owner) in queue.keys(owner_kind, namespace):
            queue.wake(owner_kind, namespace, owner)


async def _follow_demand() -> None:
    """Wake the deployments that a gateway has news of: one that sleeps is started at once."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    known: dict[str, str] = {}
    async for event in ctx.kube.watch("ConfigMap", {COMPONENT: DEMAND_COMPONENT}):
        operator.watching["demand"] = time.monotonic()
        metadata = event["object"]["metadata"] if event is not None else {}
        # Anybody may label a ConfigMap; only ours counts.
        if event is None or (metadata["namespace"], metadata["name"]) != (ctx.settings.namespace, DEMAND_CONFIGMAP):
            continue
        data = event["object"].get("data") or {}
        news = {key: text for key, text in data.items() if known.get(key) != text}
        known = dict(data)
        for demand in scaling.demands(news).values():
            key = ("AdapterDeployment", demand.namespace, demand.deployment)
            if key in queue.keys("AdapterDeployment", demand.namespace):
                queue.wake(*key)


async def _housekeeping() -> None:
    """Once at the start and every hour: the bucket, and the keys of namespaces that went while we were away."""
    ctx = operator.ctx
    assert ctx is not None  # noqa: S101
    pause = 1.0
    while True:
        try:
            if ctx.settings.storage.create_bucket:
                await asyncio.to_thread(ctx.store.create_bucket)
            await access.revoke_orphans(ctx)
            pause = 3600.0
        except Exception as error:
            log.warning("housekeeping failed, tried again: %s", error)
            pause = min(pause * 2, 60.0)
        await asyncio.sleep(pause)


async def _signing_keys() -> None:
    """Follow the Secret, which only a GET by name may read; all versions are signed anew when its keys have changed."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    while True:
        await asyncio.sleep(float(os.environ.get("GRAFT_KEYS_SECONDS", signing.KEYS_SECONDS)))
        if await signing.refresh(ctx):
            for key in queue.keys("Adapter"):
                queue.wake(*key)


@kopf.on.probe(id="reconciler")
def reconciler_alive(**_: Any) -> dict[str, Any]:
    """Fails when a look hangs; kopf answers 500 when a probe raises."""
    queue = operator.queue
    if queue is None:
        return {"started": False}
    now = time.monotonic()
    slow = {"/".join(key): round(now - since) for key, since in queue.busy.items() if now - since > STUCK_AFTER}
    if slow:
        raise kopf.PermanentError(f"hanging: {slow}")
    return {"busy": len(queue.busy), "lastDoneSecondsAgo": round(now - queue.last_done)}


@kopf.on.probe(id="watches")
def watches_alive(**_: Any) -> dict[str, Any]:
    """Fails when a watch of the children has not worked for long: it is reopened every few minutes even in silence."""
    now = time.monotonic()
    ages = {kind: round(now - seen) for kind, seen in operator.watching.items()}
    dead = [task.get_name() for task in operator.tasks if task.done()]
    if dead or any(age > STUCK_AFTER * 3 for age in ages.values()):
        raise kopf.PermanentError(f"watches are not alive: {dead} {ages}")
    return ages
