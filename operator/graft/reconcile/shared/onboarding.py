"""Issue the storage key of a namespace that asks for it with a label, so that the first dataset can be uploaded before
the first job."""

import asyncio
import logging

from graft.kube import KubeError, Manifest
from graft.reconcile.shared.access import ensure_credentials
from graft.reconcile.shared.context import Context

log = logging.getLogger(__name__)
# Only those who may write the Namespace can set it.
LABEL, ISSUE = "graft.dev/credentials", "issue"
RETRY = 10.0  # seconds; the RoleBinding of a new namespace often comes after the namespace


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
