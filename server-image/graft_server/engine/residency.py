"""The adapters in memory: the most recently used adapters, and all adapters that running sequences need.

Any thread may add an adapter. Only the engine's thread uses and removes adapters. If more than `max_cpu_loras` are
resident, idle registered adapters are evicted. When a request needs an evicted adapter, it is read again from its path,
in parallel with the running steps.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count

from graft_server.engine.adapters import AdapterWeights

log = logging.getLogger(__name__)

_keys = count()


def _new_key() -> str:
    return f"adapter{next(_keys)}"


@dataclass(eq=False)
class Adapter:
    """A registered adapter.

    `key` is never reused, so a request never gets a newer adapter with the same name. A `retired` adapter was unloaded
    or replaced. It leaves memory after its last request.
    """

    name: str
    path: str
    key: str = field(default_factory=_new_key)
    retired: bool = False


class Residency:
    """The weights of adapters in memory."""

    def __init__(self, max_cpu_loras: int) -> None:
        self._max_resident = max_cpu_loras
        self._resident: OrderedDict[Adapter, AdapterWeights] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of the adapters in memory."""
        with self._lock:
            return [adapter.name for adapter in self._resident]

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter in self._resident

    def put(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Add an adapter that was read, as the most recently used one."""
        with self._lock:
            self._resident[adapter] = weights
            self._resident.move_to_end(adapter)

    def use(self, adapter: Adapter) -> AdapterWeights:
        """Return the weights of a resident adapter and mark it as most recently used."""
        with self._lock:
            self._resident.move_to_end(adapter)
            return self._resident[adapter]

    def trim(self, needed: Collection[Adapter], waiting: Collection[Adapter]) -> None:
        """Free retired adapters that no request needs, and evict idle ones beyond the limit, least recent use first."""
        with self._lock:
            for adapter in list(self._resident):
                if adapter in needed:
                    continue
                if adapter.retired:
                    if adapter not in waiting:
                        del self._resident[adapter]
                elif len(self._resident) > self._max_resident:
                    del self._resident[adapter]
                    log.info("evicted adapter %s", adapter.name)
