"""Remember which versions of an adapter have files in the bucket, and what was published for jobs that have not ended.

So a burst of jobs lists an adapter once, and a manifest is read once. Only the operator writes below adapters/. It forgets
an adapter's versions when it publishes or deletes one.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from graft.artifacts import layout
from graft.artifacts.manifest import Manifest
from graft.artifacts.store import S3Store

FRESH = 60.0  # seconds; files that somebody else has put there are found after it
MOST_ADAPTERS = 10_000


class _Listed(NamedTuple):
    at: float
    versions: list[str]


class _Published(NamedTuple):
    at: float
    manifest: Manifest
    digest: str


class Folders:
    """The version folders of each adapter, as they were listed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listed: dict[tuple[str, str], _Listed] = {}
        self._published: dict[tuple[str, str], dict[str, _Published]] = {}  # namespace and adapter -> by version

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

    def manifest(self, namespace: str, adapter: str, version: str) -> tuple[Manifest, str] | None:
        """Return the manifest of a version and its digest if it was read a short time ago."""
        found = self._published.get((namespace, adapter), {}).get(version)
        return None if found is None or self._clock() - found.at > FRESH else (found.manifest, found.digest)

    def found(self, namespace: str, adapter: str, version: str, manifest: Manifest, digest: str) -> None:
        """Take the manifest of a version that was read from the store."""
        if len(self._published) >= MOST_ADAPTERS:
            self._published.clear()
        now = self._clock()
        fresh = {
            name: item for name, item in self._published.get((namespace, adapter), {}).items() if now - item.at < FRESH
        }
        self._published[namespace, adapter] = fresh | {version: _Published(now, manifest, digest)}

    def forget(self, namespace: str, adapter: str) -> None:
        """Read the versions of an adapter again: the operator has published or deleted one."""
        self._listed.pop((namespace, adapter), None)
        self._published.pop((namespace, adapter), None)
