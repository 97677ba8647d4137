"""Issue storage keys outside of reconciles: to namespaces that ask for one with a label, so that the first dataset can be
uploaded before the first job, and again to namespaces at work whose Secret was deleted or changed.

How a key is issued, access.py knows.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from graft.cache.cache import Source
from graft.cache.informer import Informer
from graft.cache.objects import Place
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import Kube, KubeError, Manifest
from graft.reconcile.shared.access import ensure_credentials
from graft.reconcile.shared.context import Context

log = logging.getLogger(__name__)
# Only those who may write the Namespace can set it.
LABEL, ISSUE = "graft.dev/credentials", "issue"
RETRY = 10.0  # seconds; the RoleBinding of a new namespace often comes after the namespace
MOST_FOLLOWED = 256  # namespaces, because each costs a connection
LOOK = 240.0  # seconds after which a namespace that is not at work any more is no longer followed
AGAIN, LATEST = 2.0, 60.0  # seconds until a failed repair is repeated: at first, and at most


class Requests:
    """The namespaces that ask for a key and do not have it yet."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}  # namespace -> why it has no key yet
        self._changed = asyncio.Event()

    def note(self, event: Manifest) -> None:
        """Take an event of the watch of all namespaces."""
        metadata = event["object"]["metadata"]
        if event["type"] != "DELETED" and (metadata.get("labels") or {}).get(LABEL) == ISSUE:
            self._waiting.setdefault(metadata["name"], "")
            self._changed.set()
        else:
            self._waiting.pop(metadata["name"], None)

    async def issue(self, ctx: Context) -> None:
        """Issue keys without end. A namespace whose key cannot be issued is retried, and logged when the cause changes."""
        while True:
            for namespace in sorted(self._waiting):
                why = await _issue(ctx, namespace)
                if why is None:
                    self._waiting.pop(namespace, None)
                elif self._waiting.get(namespace) not in {None, why}:
                    self._waiting[namespace] = why
                    log.warning("namespace %s asks for a storage key but has none yet: %s", namespace, why)
            try:
                await asyncio.wait_for(self._changed.wait(), RETRY if self._waiting else None)
            except TimeoutError:
                continue
            self._changed.clear()


async def _issue(ctx: Context, namespace: str) -> str | None:
    """Issue the key of a namespace if it has none. Return why that is not possible now, or None."""
    try:
        trouble = await ensure_credentials(ctx, namespace)
    except KubeError as error:
        return str(error)
    return trouble.message if trouble is not None else None


class Followed:
    """The Secrets graft-storage of the namespaces at work. A Secret that is deleted or changed is put right at once.

    RBAC allows the operator to follow this Secret by its name, one namespace at a time, and no other Secret. Only its
    metadata is requested. The kubelet follows the Secrets of its pods in the same way.
    """

    def __init__(self, ctx: Context, kube: Kube, at_work: Callable[[str], bool]) -> None:
        """`kube`: a connection for MOST_FOLLOWED watches, which must not delay the requests of the reconciles.
        `at_work`: whether pods of a namespace use its key, or may start at any time."""
        self._ctx, self._kube, self._at_work = ctx, kube, at_work
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def namespaces(self) -> set[str]:
        """Return the namespaces that are followed."""
        return set(self._tasks)

    def follow(self, namespace: str) -> None:
        """Follow the Secret of a namespace in which a job or a deployment begins to work."""
        if namespace not in self._tasks and len(self._tasks) < MOST_FOLLOWED:
            task = asyncio.create_task(self._follow(namespace), name=f"key of namespace {namespace}")
            self._tasks[namespace] = task
            task.add_done_callback(lambda _: self._tasks.pop(namespace, None))

    async def stop(self) -> None:
        for task in (tasks := list(self._tasks.values())):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kube.close()

    async def _follow(self, namespace: str) -> None:
        changed = asyncio.Event()
        source = Source("Secret", only=(namespace, STORAGE_SECRET), listed=False, watched=False)
        watch = Informer(self._kube, source, _Changes(lambda: self._ctx.issued.get(namespace), changed))
        watching = asyncio.create_task(watch.run(), name=f"watch Secret {namespace}")
        pause = AGAIN
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOOK)
                if not self._at_work(namespace):
                    return
                if changed.is_set():
                    changed.clear()
                    if await self._repair(namespace):
                        pause = AGAIN
                    else:
                        changed.set()
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, LATEST)
        finally:
            watching.cancel()

    async def _repair(self, namespace: str) -> bool:
        """Put the Secret right. Return False if that has to be repeated."""
        try:
            trouble = await ensure_credentials(self._ctx, namespace, changed=True)
        except Exception as error:
            log.warning("cannot check the storage key of namespace %s, the operator retries: %r", namespace, error)
            return False
        # The Secret of a user is the user's own. Its next change is an event.
        return trouble is None or trouble.reason in {"CredentialsMissing", "NamespaceReserved"}


class _Changes:
    """Notes that a Secret does not have the version that is known to be right."""

    def __init__(self, right: Callable[[], str | None], changed: asyncio.Event) -> None:
        self._right, self._changed = right, changed

    def received(self, item: Manifest, *, whole: bool) -> None:
        if item["metadata"]["resourceVersion"] != self._right():
            self._changed.set()

    def deleted(self, item: Manifest) -> None:
        self._changed.set()

    def listed(self, places: set[Place], version: int) -> None:
        if not places:
            self._changed.set()

    def restored(self) -> None:
        self._changed.set()
