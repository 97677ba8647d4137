"""The only code that imports kopf. Watches of our kinds wake the reconcilers, and probes report whether watches and
reconciles work.

The handlers are low-level (`kopf.on.event`), so kopf never writes finalizers, annotations or progress. The only writes
are those of the reconcilers. kube.watch watches the children with a label selector that the API server evaluates.
Without the selector, the operator would receive the events of all pods in a large cluster.
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
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.contracts.gateway import DEMAND_CONFIGMAP
from graft.contracts.mounts import STORAGE_DIR
from graft.kube import Kube, KubeError, Manifest
from graft.manifests.adapter import JOB_UID
from graft.manifests.metadata import OWNER_UID
from graft.reconcile import basemodel
from graft.reconcile.adapter import adapter, retention, signing, versions
from graft.reconcile.adapterdeployment import adapterdeployment, callers, orphans, scaling
from graft.reconcile.finetunejob import finetunejob
from graft.reconcile.shared import access, storerights
from graft.reconcile.shared.admission import admit
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.onboarding import Requests
from graft.reconcile.shared.ownership import owner_of
from graft.reconcile.shared.queue import Key, Queue
from graft.settings import load as load_settings

log = logging.getLogger(__name__)

# ScaledObjects are not watched, because the kind may not exist in the cluster. The next reconcile corrects them.
CHILDREN = (
    "Job",
    "Pod",
    "Deployment",
    "ConfigMap",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
)
STUCK_AFTER = 300.0  # seconds; a single reconcile that takes longer hangs
METRICS_PORT = 9090
PAGE = 100  # resources in one page of kopf's listings, whose bodies it holds in memory

RECONCILERS: dict[str, Callable[[Context, str, str], Awaitable[float | None]]] = {
    "BaseModel": basemodel.reconcile,
    "FineTuneJob": finetunejob.reconcile,
    "Adapter": adapter.reconcile,
    "AdapterDeployment": adapterdeployment.reconcile,
}


class Operator:
    """The state of one operator process."""

    def __init__(self) -> None:
        self.ctx: Context | None = None
        self.queue: Queue | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.requests = Requests()
        self.uids: dict[Key, str] = {}  # of the resources that have a worker
        self.watching: dict[str, float] = {}  # child kind -> when its watch last worked
        # (namespace, name) of an AdapterDeployment -> the strings in its spec and status
        self.said: dict[tuple[str, str], set[retention.Said]] = {}


operator = Operator()


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Connect to the API server and the object store, and start the queue, the watches and the periodic tasks."""
    settings.posting.enabled = False
    settings.watching.inactivity_timeout = 70  # a silent watch is reopened (kopf#204, #698)
    settings.watching.server_timeout = 300
    settings.watching.chunk_size = PAGE
    settings.networking.request_timeout = 30
    settings.persistence.finalizer = f"{GROUP}/kopf-unused"
    await _start_operator()


async def _start_operator() -> None:
    config = load_settings()
    store = await asyncio.to_thread(S3Store, StorageConfig.from_dir(os.environ.get("GRAFT_STORAGE_DIR", STORAGE_DIR)))
    kube = await Kube.connect()
    ctx = Context(kube, config, store, await storerights.open_identity(kube, config, store))
    await signing.refresh(ctx)
    await callers.refresh(ctx)
    operator.ctx = ctx
    operator.queue = Queue({kind: partial(admit, ctx, kind, reconcile) for kind, reconcile in RECONCILERS.items()})
    ctx.wake = _wake_known
    start_http_server(int(os.environ.get("GRAFT_METRICS_PORT", METRICS_PORT)))
    operator.tasks = [asyncio.create_task(_follow(kind), name=f"watch {kind}") for kind in CHILDREN]
    operator.tasks.append(asyncio.create_task(_follow_demand(), name="watch demand"))
    operator.tasks.append(asyncio.create_task(_follow_namespaces(), name="watch namespaces"))
    operator.tasks.append(asyncio.create_task(operator.requests.issue(ctx), name="requested keys"))
    operator.tasks.append(asyncio.create_task(_housekeeping(), name="housekeeping"))
    operator.tasks.append(asyncio.create_task(_keys(), name="keys"))


def _wake_known(kind: str, namespace: str, name: str) -> None:
    """Reconcile a resource that still exists. Work that ends after a deletion must not start a worker again."""
    if operator.queue is not None and (kind, namespace, name) in operator.uids:
        operator.queue.wake(kind, namespace, name)


@kopf.on.cleanup()
async def stop(**_: Any) -> None:
    """Stop the workers. The next start resumes their work from the state in the cluster."""
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
    """Reconcile the resource that changed, and the resources that refer to it."""
    queue = operator.queue
    if queue is None:
        return
    kind, meta = body["kind"], body["metadata"]
    namespace, name = meta.get("namespace") or "", meta["name"]
    metrics.WATCH_EVENTS.labels(kind).inc()
    if event.get("type") is None:  # the first listing after a start: spread the reconciles
        await asyncio.sleep(random.uniform(0, 0.2))  # noqa: S311 - jitter
    if kind in RECONCILERS:
        if event.get("type") == "DELETED":
            operator.uids.pop((kind, namespace, name), None)
            queue.forget(kind, namespace, name)
            if operator.ctx is not None:
                operator.ctx.transfers.forget(meta["uid"])
                operator.ctx.backoff.forget(meta["uid"])
                if kind == "AdapterDeployment":
                    await orphans.deleted(operator.ctx, dict(body))
        else:
            operator.uids[kind, namespace, name] = meta["uid"]
            queue.wake(kind, namespace, name)
    for other in _referring(kind, dict(body), event.get("type")):
        queue.wake(*other)
    if kind == "BaseModel" and event.get("type") == "DELETED" and operator.ctx is not None:
        await storerights.model_deleted(operator.ctx)


def _referring(kind: str, body: Manifest, change: str | None) -> list[tuple[str, str, str]]:
    """Return the other resources to reconcile when a resource changes. `change` is the event's type. It is None for a
    listing, before which events may have been missed, above all deletions."""
    queue = operator.queue
    assert queue is not None  # noqa: S101
    namespace, own = body["metadata"].get("namespace") or "", body["metadata"]["name"]
    if kind == "BaseModel":
        return queue.keys("FineTuneJob") + queue.keys("AdapterDeployment") + queue.keys("Adapter")
    if kind == "Adapter":
        job = (body.get("spec", {}).get("job") or {}).get("name")
        made = JOB_UID in (body["metadata"].get("labels") or {})
        jobs = [key for key in queue.keys("FineTuneJob", namespace) if made and key[2] == job]
        adapter = body["spec"]["adapter"]  # the newest version, and the target of a rollback, may have changed
        siblings = [key for key in _versions(namespace, {adapter}) if key[2] != own]
        # A parent that a composition waits for may be Archived. Its reconcile restores it.
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
        # Also reconcile versions that the deployment no longer names or uses. Rollback targets depend on them.
        return _versions(namespace, _adapters_in(before ^ said))
    return []


def _adapters_in(said: set[retention.Said]) -> set[str]:
    """Return the adapters that any of these strings could name: by name, by reference or by version (PURE)."""
    found = set()
    for _, text in said:
        name, _, version = text.rpartition("-")
        found.add(name if versions.parse(version) else text.partition("@")[0])
    return found


def _versions(namespace: str, adapters: set[str]) -> list[tuple[str, str, str]]:
    """Return the queue's keys of all versions of these adapters."""
    assert operator.queue is not None  # noqa: S101
    return [key for key in operator.queue.keys("Adapter", namespace) if key[2].rpartition("-")[0] in adapters]


async def _follow_namespaces() -> None:
    """Issue the storage keys that namespaces ask for, and revoke those of namespaces that are deleted."""
    ctx = operator.ctx
    assert ctx is not None  # noqa: S101
    async for event in ctx.kube.watch("Namespace", {}):
        operator.watching["Namespace"] = time.monotonic()
        if event is None:
            continue
        operator.requests.note(event)
        if event["type"] != "DELETED":
            continue
        try:
            await access.revoke_orphans(ctx)
        except (StoreError, KubeError) as error:
            log.warning(
                "cannot revoke the storage keys of deleted namespaces, the next housekeeping retries: %s", error
            )


async def _follow(kind: str) -> None:
    """Wake the owner of each child that changes. A broken watch is opened again, and the resync covers the gap."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    async for event in ctx.kube.watch(kind, {OWNER_UID: None}):
        operator.watching[kind] = time.monotonic()
        if event is None:
            continue
        metrics.WATCH_EVENTS.labels(kind).inc()
        owner = owner_of(kind, event["object"], operator.uids, ctx.settings.namespace)
        if owner is not None:
            queue.wake(*owner)


async def _follow_demand() -> None:
    """Wake the deployments for which a gateway has written new demand, so that a sleeping deployment starts at once."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    known: dict[str, str] = {}
    # Any user can set labels on a ConfigMap. Only this one, in the operator's namespace, counts.
    async for event in ctx.kube.watch("ConfigMap", {}, only=(ctx.settings.namespace, DEMAND_CONFIGMAP)):
        operator.watching["demand"] = time.monotonic()
        if event is None:
            continue
        data = event["object"].get("data") or {}
        news = {key: text for key, text in data.items() if known.get(key) != text}
        known = dict(data)
        for demand in scaling.demands(news).values():
            key = ("AdapterDeployment", demand.namespace, demand.deployment)
            if key in queue.keys("AdapterDeployment", demand.namespace):
                queue.wake(*key)


async def _housekeeping() -> None:
    """At the start and every hour, create the bucket if configured, and correct the rights and the keys of the namespaces."""
    ctx = operator.ctx
    assert ctx is not None  # noqa: S101
    pause = 1.0
    while True:
        try:
            if ctx.settings.storage.create_bucket:
                await asyncio.to_thread(ctx.store.create_bucket)
            await storerights.allow_models(ctx)
            await access.revoke_orphans(ctx)
            await orphans.sweep(ctx)
            pause = 3600.0
        except Exception as error:
            log.warning("housekeeping failed, the operator retries: %s", error)
            pause = min(pause * 2, 60.0)
        await asyncio.sleep(pause)


async def _keys() -> None:
    """Poll the Secrets with the signing keys and the gateways' keys, because RBAC allows only a GET by name. If the
    signing keys changed, reconcile all versions, which signs them again. If the others changed, reconcile all
    deployments."""
    ctx, queue = operator.ctx, operator.queue
    assert ctx is not None and queue is not None  # noqa: S101
    while True:
        await asyncio.sleep(float(os.environ.get("GRAFT_KEYS_SECONDS", signing.KEYS_SECONDS)))
        if await signing.refresh(ctx):
            for key in queue.keys("Adapter"):
                queue.wake(*key)
        if await callers.refresh(ctx):
            for key in queue.keys("AdapterDeployment"):
                queue.wake(*key)


@kopf.on.probe(id="reconciler")
def reconciler_alive(**_: Any) -> dict[str, Any]:
    """Fail if a reconcile hangs. kopf answers 500 when a probe raises an exception."""
    queue = operator.queue
    if queue is None:
        return {"started": False}
    now = time.monotonic()
    slow = {"/".join(key): round(now - since) for key, since in queue.busy.items() if now - since > STUCK_AFTER}
    if slow:
        raise kopf.PermanentError(f"reconciles that take longer than {STUCK_AFTER:.0f} s: {slow}")
    return {"busy": len(queue.busy), "lastDoneSecondsAgo": round(now - queue.last_done)}


@kopf.on.probe(id="watches")
def watches_alive(**_: Any) -> dict[str, Any]:
    """Fail if a watch of the children has not worked for a long time. Even without events, a watch is reopened every
    few minutes."""
    now = time.monotonic()
    ages = {kind: round(now - seen) for kind, seen in operator.watching.items()}
    dead = [task.get_name() for task in operator.tasks if task.done()]
    if dead or any(age > STUCK_AFTER * 3 for age in ages.values()):
        raise kopf.PermanentError(
            f"watches do not work: ended tasks {dead}, seconds since the last sign of life {ages}"
        )
    return ages
