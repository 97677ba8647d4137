"""Remember which stored files the operator has read whole, so that it reads no file twice unless the file changed.

Nothing is remembered across a restart of the operator.
"""

import threading
from collections import OrderedDict

from graft.artifacts.store import ObjectInfo

MOST = 256  # files of one tenant; the one that was used longest ago is forgotten first


class Verified:
    """The files whose SHA-256 the operator has computed, by tenant. Threads of transfers use it."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: dict[str, OrderedDict[tuple[str, str, int], str]] = {}

    def sha256(self, tenant: str, found: ObjectInfo) -> str | None:
        """Return the SHA-256 (hex) that was read for an object with this key, ETag and size, or None."""
        with self._lock:
            known = self._known.get(tenant, OrderedDict())
            key = (found.key, found.etag, found.size)
            if key in known:
                known.move_to_end(key)
            return known.get(key)

    def add(self, tenant: str, found: ObjectInfo, sha256: str) -> None:
        """Record the SHA-256 (hex) of an object. Only the newest state of an object is kept."""
        with self._lock:
            known = self._known.setdefault(tenant, OrderedDict())
            for old in [key for key in known if key[0] == found.key]:
                del known[old]
            known[found.key, found.etag, found.size] = sha256
            while len(known) > self._most:
                known.popitem(last=False)
