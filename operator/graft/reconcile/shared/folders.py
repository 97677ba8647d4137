"""Remember which versions of an adapter have files in the bucket, so that a burst of jobs lists them once.

Only the operator writes below adapters/. It forgets an adapter's versions when it publishes or deletes one.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from graft.artifacts import layout
from graft.artifacts.store import S3Store

FRESH = 60.0  # seconds; files that somebody else has put there are found after it
MOST_ADAPTERS = 10_000


class _Listed(NamedTuple):
    at: float
    versions: list[str]


class Folders:
    """The version folders of each adapter, as they were listed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listed: dict[tuple[str, str], _Listed] = {}

    def versions(self, store: S3Store, namespace: str, adapter: str) -> list[str]:
        """Return the names of the folders of an adapter. Blocks if they have to be listed. Raises StoreError."""
        key, now = (namespace, adapter), self._clock()
        found = self._listed.get(key)
        if found is None or now - found.at > FRESH:
            prefix = layout.adapter_versions_prefix(layout.tenant_of(namespace), adapter)
            found = _Listed(now, store.folders(prefix))
            if len(self._listed) >= MOST_ADAPTERS:
                self._listed.clear()
            self._listed[key] = found
        return found.versions

    def forget(self, namespace: str, adapter: str) -> None:
        """List the versions of an adapter again: the operator has published or deleted one."""
        self._listed.pop((namespace, adapter), None)
