"""Which adapters are in memory: the most recently used ones, and all that running sequences need.

Any thread may put an adapter there; only the engine's uses them and takes them out. An adapter that is registered may be
evicted when it is idle and more than `max_cpu_loras` are resident; it is read again from its path when a request needs it,
beside the running steps.
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

    `key` is never used twice, so no request can meet another adapter that took its name over. A `retired` adapter was
    unloaded or replaced; it leaves memory with its last request.
    """

    name: str
    path: str
    key: str = field(default_factory=_new_key)
    retired: bool = False


class Residency:
    """Adapters' weights in memory."""

    def __init__(self, max_cpu_loras: int) -> None:
        self._max_resident = max_cpu_loras
        self._resident: OrderedDict[Adapter, AdapterWeights] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of the adapters in memory."""
        with self._lock:
            return [adapter.name for adapter in self._resident]

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter in self._resident

    def put(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Takes an adapter that was read, as the one used last."""
        with self._lock:
            self._resident[adapter] = weights
            self._resident.move_to_end(adapter)

    def use(self, adapter: Adapter) -> AdapterWeights:
        """The weights of a resident adapter, which is used now."""
        with self._lock:
            self._resident.move_to_end(adapter)
            return self._resident[adapter]

    def trim(self, needed: Collection[Adapter], waiting: Collection[Adapter]) -> None:
        """Frees retired adapters that no request needs, then evicts idle ones beyond the limit, oldest first."""
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
