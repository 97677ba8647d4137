"""The only code that imports kopf, which runs the process: start, signals, clean-up and probes.

Changes in the cache wake the reconcilers (graft/wakes.py). Probes report whether watches and reconciles work. kopf
watches nothing: it would hold the whole body of each object, and it does not notice what was deleted while a watch was
interrupted.
"""

import asyncio
import itertools
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import kopf
from prometheus_client import REGISTRY, start_http_server

from graft import metrics, wakes
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.cache.cache import Cache, Change, Source
from graft.connection import TIMEOUT
from graft.contracts.addresses import any_address
from graft.contracts.mounts import STORAGE_DIR
from graft.kube import Kube, KubeError
from graft.lease import Election
from graft.metrics.resources import Resources
from graft.reconcile import apikey, basemodel, orphans, tenant
from graft.reconcile.adapter import adapter, signing
from graft.reconcile.adapterdeployment import adapterdeployment, callers
from graft.reconcile.finetunejob import finetunejob
from graft.reconcile.shared import access, storekey, storerights
from graft.reconcile.shared.admission import admit
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.queue import Queue
from graft.reconcile.shared.storagekeys import MOST_FOLLOWED, Followed, Requests
from graft.settings import Settings
from graft.settings import load as load_settings
from graft.status import REASONS

log = logging.getLogger(__name__)

STUCK_AFTER = 300.0  # seconds; a single reconcile that takes longer hangs
STILL, LISTED_AFTER = 20.0, 90.0  # seconds; see `listed`. The chart's startup probe waits for 120 s
METRICS_PORT = 9090
KOPF_AGAIN = 5.0  # seconds until kopf repeats a request that failed
BRIEF = 4.0  # seconds for an answer of the store to a short call, which is sent at most twice

RECONCILERS: dict[str, Callable[[Context, str, str], Awaitable[float | None]]] = {
    "BaseModel": basemodel.reconcile,
    "FineTuneJob": finetunejob.reconcile,
    "Adapter": adapter.reconcile,
    "AdapterDeployment": adapterdeployment.reconcile,
    "ApiKey": apikey.reconcile,
    "Tenant": tenant.reconcile,
}


class Operator:
    """The state of one operator process."""

    def __init__(self) -> None:
        self.ctx: Context | None = None
        self.queue: Queue | None = None
        self.election: Election | None = None
        self.leads = False  # whether it works; a standby only follows the cluster
        self.tasks: list[asyncio.Task[None]] = []
        self.errands: set[asyncio.Task[None]] = set()  # short work that events cause
        self.requests = Requests()
        self.keys: Followed | None = None  # None: the operator issues no keys
        self.cache: Cache | None = None
        self.resources = Resources(REASONS, shown=lambda: self.leads)
        self.started = False  # whether it has begun to reconcile what exists


operator = Operator()


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Connect to the API server and the object store, and start the queue, the watches and the periodic tasks."""
    settings.posting.enabled = False
    settings.scanning.disabled = True  # kopf watches nothing: no kinds, and no namespaces
    settings.networking.request_timeout = 30
    # kopf asks once which kinds exist, and ends the operator if that fails in the end. Nothing depends on the answer.
    settings.networking.error_backoffs = itertools.repeat(KOPF_AGAIN)
    await _start_operator()


async def _start_operator() -> None:
    # Pods of a cluster have the families of the operator's own pod.
    config = load_settings().model_copy(update={"ipv6": ":" in os.environ.get("POD_IPS", "")})
    storage = await _storage(config)
    election = await _candidate(config)
    may_write = election.fence.may_write if election is not None else lambda: True
    write_seconds = election.fence.seconds if election is not None else lambda: TIMEOUT
    store = await asyncio.to_thread(partial(S3Store, storage, may_write=may_write))
    # A reconcile is retried, so its own calls need not be patient.
    brief = await asyncio.to_thread(partial(S3Store, storage, attempts=2, timeout=BRIEF, may_write=may_write))
    kube = await Kube.connect(write_seconds)
    place = config.namespace
    cache = Cache(kube, wakes.sources(place), lambda source, item: wakes.belongs(source, item, place), changed)
    ctx = Context(kube, config, store, await storerights.open_identity(kube, config, brief), brief, cache=cache)
    ctx.elected = election is not None
    operator.ctx, operator.cache = ctx, cache
    if ctx.identity is not None:
        watches = await Kube.connect(most=MOST_FOLLOWED + 8)
        operator.keys = Followed(ctx, watches, partial(wakes.at_work, objects=cache.objects))
    reconcilers = {kind: partial(admit, ctx, kind, reconcile) for kind, reconcile in RECONCILERS.items()}
    operator.queue = Queue(reconcilers, over=partial(wakes.is_over, objects=cache.objects))
    ctx.wake = _wake_known
    _show_health(cache, operator.queue)
    start_http_server(int(os.environ.get("GRAFT_METRICS_PORT", METRICS_PORT)), any_address())
    if election is None:
        metrics.LEADER.set(1)
        await _lead(ctx, cache, operator.queue)
    else:
        operator.tasks.append(asyncio.create_task(_stand(ctx, cache, operator.queue, election), name="election"))
    operator.tasks += cache.start()
    await listed(cache)


async def listed(cache: Cache) -> None:
    """Wait until everything is listed. The probe answers after this.

    So "healthy" means that new resources are reconciled at once, or that a standby can take over at once. The operator
    also starts if no page of a list arrives for STILL seconds, or if the lists take longer than LISTED_AFTER.
    """
    began = time.monotonic()
    while missing := cache.missing():
        waited = time.monotonic() - began
        if waited > LISTED_AFTER or all(cache.age(key) > STILL for key in missing):
            log.warning("not everything is listed after %.0f s, the operator continues: %s", waited, missing)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(cache.synced(), 1.0)


def _show_health(cache: Cache, queue: Queue) -> None:
    """Let the metrics show whether the queue, the watches and the tasks keep up. The metrics' server reads them in a thread
    of its own."""
    loop = asyncio.get_running_loop()
    metrics.QUEUE_LENGTH.set_function(lambda: len(queue.waiting()))
    metrics.QUEUE_AGE.set_function(lambda: max(queue.waiting(), default=0.0))
    metrics.TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
    REGISTRY.register(operator.resources)
    for key in cache.informers:
        metrics.WATCH_AGE.labels(key).set_function(partial(cache.age, key))


async def _storage(config: Settings) -> StorageConfig:
    """Return the store's address and the operator's key. The key of the embedded store is in the Secret that GRAFT_STORE_KEY
    names, which the operator creates."""
    folder, secret = os.environ.get("GRAFT_STORAGE_DIR", STORAGE_DIR), os.environ.get("GRAFT_STORE_KEY")
    if not secret:
        return StorageConfig.from_dir(folder)
    # A connection of its own: a standby needs the key, too, and two operators create the same Secret only once.
    kube = await Kube.connect()
    try:
        return StorageConfig.from_dir(folder, await storekey.root_key(kube, config.namespace, secret))
    finally:
        await kube.close()


async def _candidate(config: Settings) -> Election | None:
    """Return this operator's candidacy for the Lease that GRAFT_LEASE names, or None: it is the only operator."""
    name = os.environ.get("GRAFT_LEASE")
    if not name:
        return None
    # Its own connection: what the reconciles send must not delay the renewal.
    operator.election = Election(await Kube.connect(), config.namespace, name)
    return operator.election


async def _stand(ctx: Context, cache: Cache, queue: Queue, election: Election) -> None:
    """Follow the cluster until this operator leads. Then work. End the process when it no longer leads, or cannot work."""
    try:
        await cache.synced()  # who has not listed everything could not work yet
        await election.acquire()
        kept = asyncio.create_task(election.keep(), name="renewals")
        operator.tasks.append(kept)
        # The former leader has written its last reservation of a version by now. The watch may not have told it yet.
        await cache.relist("FineTuneJob", "Adapter")
        await _lead(ctx, cache, queue)
        await kept
    except Exception:
        log.exception("this operator cannot lead and ends")
    os.kill(os.getpid(), signal.SIGTERM)  # the kubelet starts it again, as a candidate
    await asyncio.Event().wait()


async def _lead(ctx: Context, cache: Cache, queue: Queue) -> None:
    """Read the keys, and start the reconciles and the periodic tasks."""
    await signing.refresh(ctx)
    await callers.refresh(ctx)
    operator.leads = True
    operator.tasks.append(asyncio.create_task(_begin(cache, queue), name="first reconciles"))
    operator.tasks.append(asyncio.create_task(operator.requests.issue(ctx), name="requested keys"))
    operator.tasks.append(asyncio.create_task(_housekeeping(), name="housekeeping"))
    operator.tasks.append(asyncio.create_task(_keys(), name="keys"))


async def _begin(cache: Cache, queue: Queue) -> None:
    """Reconcile what exists, once everything has been listed: a reconcile must not miss what is not listed yet.

    What users have created or changed while no operator worked does not wait for all the rest, and neither does a job
    whose first reconcile the end of the last operator has cut off.
    """
    await cache.synced()
    operator.started = True
    for key in (found := wakes.first(cache.objects)):
        queue.wake(*key, later=not wakes.awaited(cache.objects, key))
    for namespace in {namespace for _, namespace, _ in found if namespace}:
        _follow_key(cache, namespace)
    await asyncio.Event().wait()


def _follow_key(cache: Cache, namespace: str) -> None:
    """Follow the storage key of a namespace while pods use it."""
    if operator.keys is not None and wakes.at_work(namespace, cache.objects):
        operator.keys.follow(namespace)


def _wake_known(kind: str, namespace: str, name: str) -> None:
    """Reconcile a resource that still exists. Work that ends after a deletion must not reconcile it again."""
    queue, cache = operator.queue, operator.cache
    if queue is not None and cache is not None and cache.objects(kind).get(namespace, name) is not None:
        queue.wake(kind, namespace, name)


@kopf.on.cleanup()
async def stop(**_: Any) -> None:
    """Stop the workers. The next start, or the next leader, resumes their work from the state in the cluster."""
    tasks = [*operator.tasks, *operator.errands]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if operator.queue is not None:
        await operator.queue.stop()
    if operator.keys is not None:
        await operator.keys.stop()
    if operator.ctx is not None:
        operator.ctx.transfers.stop()
        await operator.ctx.news.stop()
        await operator.ctx.kube.close()
    if operator.election is not None:
        await operator.election.release()


def changed(source: Source, change: Change) -> None:
    """Reconcile the resource that changed, and the resources that depend on it."""
    ctx, queue, cache = operator.ctx, operator.queue, operator.cache
    if ctx is None or queue is None or cache is None:
        return
    if source.kind == "Namespace":
        _note_namespace(ctx, change)
    if change.kind in RECONCILERS:
        operator.resources.note(change.kind, change.place, change.old, change.new)
    if not operator.started:
        return  # everything is reconciled when it has been listed, and this operator leads
    if operator.keys is not None and change.before is None and source.kind in {"Job", "Deployment"}:
        operator.keys.follow(change.place[0])
    if change.kind in RECONCILERS:
        _own(ctx, queue, cache, change)
    for key in wakes.concerned(source, change, cache.objects, ctx.settings.namespace):
        queue.wake(*key, after=wakes.patience(source, key[0]))


def _own(ctx: Context, queue: Queue, cache: Cache, change: Change) -> None:
    """Reconcile a resource of ours that changed, or forget it."""
    key = (change.kind, *change.place)
    before, after = change.before, change.after
    if before is not None and (after is None or after.uid != before.uid):
        ctx.transfers.forget(before.uid)
        ctx.backoff.forget(before.uid)
        if change.kind in orphans.KINDS and change.old is not None:
            _later(orphans.deleted(ctx, change.kind, change.old), f"what gateways know of a deleted {change.kind}")
        if change.kind in {"BaseModel", "Tenant"}:
            _later(storerights.deleted(ctx), "rights on base models after a deletion")
    if after is None:
        queue.forget(*key)
    elif wakes.is_over(key, cache.objects):
        if key not in queue.busy:  # else the queue forgets it after the reconcile
            queue.forget(*key)
    elif key not in queue.busy or not wakes.is_echo(change):
        queue.wake(*key)


def _note_namespace(ctx: Context, change: Change) -> None:
    """Note whether a namespace asks for its storage key. Revoke the key of a namespace that was deleted."""
    deleted = change.after is None
    operator.requests.note({"type": "DELETED" if deleted else "MODIFIED", "object": change.new or change.old})
    if deleted:
        operator.resources.forget(change.place[1])
    if deleted and operator.leads:
        _later(_revoke(ctx), "keys of a deleted namespace")


async def _revoke(ctx: Context) -> None:
    try:
        await access.revoke_orphans(ctx)
    except (StoreError, KubeError) as error:
        log.warning("cannot revoke the storage keys of deleted namespaces, the next housekeeping retries: %s", error)


def _later(work: Coroutine[Any, Any, None], name: str) -> None:
    """Do work that an event causes. Events are not delayed by it."""
    task = asyncio.create_task(work, name=name)
    operator.errands.add(task)
    task.add_done_callback(operator.errands.discard)


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


@kopf.on.probe(id="leads")
def leads(**_: Any) -> bool:
    """Tell whether this operator works. A standby is healthy, too."""
    return operator.leads


@kopf.on.probe(id="watches")
def watches_alive(**_: Any) -> dict[str, Any]:
    """Fail if a watch has not worked for a long time. Even without events, a watch is reopened every few minutes."""
    ages = {} if operator.cache is None else {key: round(age) for key, age in operator.cache.ages().items()}
    dead = [task.get_name() for task in operator.tasks if task.done()]
    if dead or any(age > STUCK_AFTER * 3 for age in ages.values()):
        raise kopf.PermanentError(
            f"watches do not work: ended tasks {dead}, seconds since the last sign of life {ages}"
        )
    return ages
