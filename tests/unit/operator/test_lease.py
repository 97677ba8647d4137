"""Leader election: at most one candidate may write at any time, whatever their clocks and the API server do."""

import asyncio
from copy import deepcopy
from typing import Any

import pytest
from graft import lease
from graft.kube import KubeError
from graft.lease import DEADLINE, DURATION, Election, Fence

SLEEP = asyncio.sleep


class Server:
    """An API server with one Lease. `away`: it does not answer."""

    def __init__(self) -> None:
        self.live: dict[str, Any] | None = None
        self.version = 0
        self.away = False

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        await self._answer()
        return deepcopy(self.live)

    async def request(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await self._answer()
        present = self.live["metadata"]["resourceVersion"] if self.live else None
        if body["metadata"].get("resourceVersion") != present:
            raise KubeError(409, "Conflict", "the object has been modified")
        assert (method == "POST") == (present is None)
        self.version += 1
        self.live = deepcopy(body)
        self.live["metadata"]["resourceVersion"] = str(self.version)
        return deepcopy(self.live)

    async def _answer(self) -> None:
        await SLEEP(0)
        if self.away:
            raise KubeError(0, "Unreachable", "no answer")


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await SLEEP(0)


def candidate(server: Server, clock: Clock) -> Election:
    return Election(server, "graft-system", "graft-operator", clock)  # type: ignore[arg-type]


async def test_one_of_two_candidates_leads_and_each_change_raises_the_generation() -> None:
    server, clock = Server(), Clock()
    first, second = candidate(server, clock), candidate(server, clock)
    assert await first._take() and not await second._take()
    assert first.fence.may_write() and not second.fence.may_write()
    assert first.generation == 1
    assert server.live is not None and server.live["spec"]["holderIdentity"] == first.identity


async def test_a_released_lease_is_taken_at_once() -> None:
    server, clock = Server(), Clock()
    first, second = candidate(server, clock), candidate(server, clock)
    await first.acquire()
    assert not await second._take()
    await first.release()
    assert not first.fence.may_write()
    assert await second._take() and second.generation == 2


async def test_a_lease_expires_when_it_has_not_changed_for_its_duration_by_the_clock_of_the_other() -> None:
    server, ours, theirs = Server(), Clock(), Clock()
    theirs.now = -5e6  # another node, whose clock has nothing to do with ours
    first, second = candidate(server, ours), candidate(server, theirs)
    await first.acquire()
    for _ in range(10):
        assert not await second._take()
        theirs.now += DURATION - 1
        assert await first._write(first.generation, first._live)  # renewed in time
    assert not await second._take()
    theirs.now += DURATION
    assert await second._take() and second.generation == 2
    assert not await first._write(first.generation, first._live), "its state is older"


async def test_the_holder_stops_writing_before_another_may_take_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = Server(), Clock()
    monkeypatch.setattr(lease.asyncio, "sleep", clock.sleep)  # type: ignore[attr-defined]
    first, second = candidate(server, clock), candidate(server, clock)
    await first.acquire()
    assert not await second._take()
    began = clock.now
    server.away = True
    await first.keep()
    assert not first.fence.may_write() and clock.now - began <= DEADLINE + lease.RETRY < DURATION
    server.away = False
    assert not await second._take()
    clock.now = began + DURATION
    assert await second._take()


@pytest.mark.parametrize("moment", ["taking", "renewing", "taken by another"])
async def test_a_release_counts_what_arrived_although_its_answer_was_lost(moment: str) -> None:
    """The task is cancelled by SIGTERM while a request is on its way, and the API server has done what it asks."""
    server, clock = Server(), Clock()
    first, second = candidate(server, clock), candidate(server, clock)
    if moment != "taking":
        await first.acquire()
    known = first._live
    await first._write(1, known)
    first._live = known
    if moment == "taken by another":
        assert server.live is not None
        server.live["spec"]["holderIdentity"] = second.identity
    await first.release()
    assert server.live is not None and not first.fence.may_write()
    assert server.live["spec"]["holderIdentity"] == (second.identity if moment == "taken by another" else "")
    assert await candidate(server, clock)._take() is (moment != "taken by another")


def test_a_process_that_was_frozen_may_not_write_when_it_goes_on() -> None:
    clock = Clock()
    fence = Fence(clock)
    assert not fence.may_write()
    fence.open(clock.now + DEADLINE)
    assert fence.may_write()
    clock.now += DURATION  # the clock runs while the process is stopped
    assert not fence.may_write() and fence.seconds() == 0


def test_a_write_has_ended_when_another_candidate_may_take_the_lease() -> None:
    clock = Clock()
    fence, renewed = Fence(clock), clock.now
    fence.open(renewed + DEADLINE)
    for later in (0.0, 1.0, DEADLINE - 0.1):
        clock.now = renewed + later
        assert clock.now + fence.seconds() == pytest.approx(renewed + DURATION)
    clock.now = renewed + DEADLINE
    assert fence.seconds() == 0
