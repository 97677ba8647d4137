"""Leader election with a Lease (coordination.k8s.io): of several operators, one may write.

The Lease expires for another operator when it has not changed for its duration, by the clock of that operator. So the
clocks of two nodes need not agree. The holder stops writing before that, by its own clock, which also runs while the
process or the machine is suspended. This module does not know what the leader does.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from graft import metrics
from graft.kinds import KINDS
from graft.kube import Kube, KubeError, Manifest

log = logging.getLogger(__name__)

DURATION = 12.0  # seconds without a change, after which another operator may take the Lease
DEADLINE = 8.0  # seconds after the last renewal, after which the holder no longer writes
RETRY = 2.0  # seconds between two attempts to take or to renew
KIND = "Lease"


def now() -> float:
    """Return seconds of a clock that no one can set, and that runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Fence:
    """Whether this operator may write now. The connection and the store ask before each write."""

    def __init__(self, clock: Callable[[], float] = now) -> None:
        self._clock = clock
        self._until = float("-inf")

    def open(self, until: float) -> None:
        """Allow writes until a time of the clock."""
        self._until = until

    def close(self) -> None:
        """Allow no more writes."""
        self._until = float("-inf")

    def may_write(self) -> bool:
        """Return whether this operator holds the Lease and nobody else can have taken it."""
        return self._clock() < self._until

    def seconds(self) -> float:
        """Return for how long a write that begins now may take, 0 if none may begin. Nobody else has taken the Lease then."""
        return self._until + DURATION - DEADLINE - self._clock() if self.may_write() else 0.0


class Election:
    """One candidate for a Lease. `kube` must be a connection that the fence does not close."""

    def __init__(self, kube: Kube, namespace: str, name: str, clock: Callable[[], float] = now) -> None:
        self.identity = f"{os.environ.get('HOSTNAME', 'graft-operator')[:200]}_{uuid.uuid4()}"
        self.fence = Fence(clock)
        self.generation = 0  # leaseTransitions of the Lease while this candidate holds it
        self._kube, self._namespace, self._name, self._clock = kube, namespace, name, clock
        self._live: Manifest | None = None  # as this candidate has written it
        self._seen = ("", 0.0)  # resourceVersion of another holder's Lease, and when it was seen first

    async def acquire(self) -> None:
        """Wait until this candidate holds the Lease."""
        while True:
            try:
                async with asyncio.timeout(DEADLINE / 2):
                    if await self._take():
                        log.info("this operator leads", extra={"generation": self.generation})
                        metrics.LEADER.set(1)
                        return
            except (KubeError, TimeoutError) as error:
                log.warning("cannot take the Lease %s, retrying: %s", self._name, error or "no answer")
            await asyncio.sleep(RETRY)

    async def keep(self) -> None:
        """Renew the Lease. Return when it is lost; nothing is written any more by then."""
        while True:
            await asyncio.sleep(RETRY)
            try:
                async with asyncio.timeout(DEADLINE / 2):
                    held = await self._write(self.generation, self._live)
            except (KubeError, TimeoutError) as error:
                log.warning("cannot renew the Lease %s, retrying: %s", self._name, error or "no answer")
                held = self.fence.may_write()
            if not held:
                break
        self.fence.close()
        metrics.LEADER.set(0)
        log.error("this operator lost the Lease %s and ends", self._name)

    async def release(self) -> None:
        """Write no more, and let another candidate take the Lease at once."""
        self.fence.close()
        metrics.LEADER.set(0)
        try:
            async with asyncio.timeout(DEADLINE / 2):
                # Not `self._live`: an attempt to take or to renew may have arrived whose answer was lost by a cancellation.
                live = await self._kube.get(KIND, self._namespace, self._name)
                spec = (live or {}).get("spec") or {}
                if spec.get("holderIdentity") == self.identity:
                    await self._write(int(spec.get("leaseTransitions") or 0), live, holder="")
                    log.info("released the Lease %s", self._name)
        except (KubeError, TimeoutError) as error:
            log.warning("cannot release the Lease %s, it expires: %s", self._name, error or "no answer")

    async def _take(self) -> bool:
        """Take the Lease if nobody holds it, or if its holder has not renewed it."""
        live = await self._kube.get(KIND, self._namespace, self._name)
        spec = (live or {}).get("spec") or {}
        if live is not None:
            version = live["metadata"]["resourceVersion"]
            if version != self._seen[0]:
                self._seen = (version, self._clock())
            age, duration = self._clock() - self._seen[1], float(spec.get("leaseDurationSeconds") or DURATION)
            if spec.get("holderIdentity") and age < duration:
                return False
        return await self._write(int(spec.get("leaseTransitions") or 0) + 1, live)

    async def _write(self, generation: int, live: Manifest | None, holder: str | None = None) -> bool:
        """Write the Lease over the state in `live`. Return False if another candidate has written it meanwhile."""
        started = self._clock()
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        holder = self.identity if holder is None else holder
        before = ((live or {}).get("spec") or {}) if generation == self.generation else {}
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": int(DURATION) if holder else 1,
            "acquireTime": before.get("acquireTime", at),
            "renewTime": at,
            "leaseTransitions": generation,
        }
        metadata = {"name": self._name, "namespace": self._namespace}
        if live is not None:  # makes the write fail if the Lease has changed
            metadata["resourceVersion"] = live["metadata"]["resourceVersion"]
        body = {"apiVersion": KINDS[KIND].api_version, "kind": KIND, "metadata": metadata, "spec": spec}
        method = "POST" if live is None else "PUT"
        path = KINDS[KIND].path(self._namespace, None if live is None else self._name)
        try:
            self._live = await self._kube.request(method, path, body)
        except KubeError as error:
            if error.status == 409:
                return False
            raise
        self.generation = generation
        if holder:
            self.fence.open(started + DEADLINE)
        return True
