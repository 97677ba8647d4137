"""When the probe begins to answer: after the first lists, as long as they make progress."""

import asyncio
from typing import Any

import pytest
from graft import handlers


class Lists:
    """A cache whose kind Pod is listed after `lasts` seconds. While `alive`, pages of its list arrive."""

    def __init__(self, clock: list[float], lasts: float, *, alive: bool) -> None:
        self.clock, self.lasts, self.alive = clock, lasts, alive

    def missing(self) -> list[str]:
        return ["Pod"] if self.clock[0] < self.lasts else []

    def age(self, _: str) -> float:
        return 1.0 if self.alive else self.clock[0]

    async def synced(self) -> None:
        self.clock[0] += 1.0
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("lasts", "alive", "waited"),
    [(0.0, True, 0.0), (70.0, True, 70.0), (1000.0, True, 91.0), (1000.0, False, 21.0), (15.0, False, 15.0)],
)
async def test_the_probe_waits_for_lists_that_make_progress(
    monkeypatch: pytest.MonkeyPatch, lasts: float, alive: bool, waited: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr(handlers.time, "monotonic", lambda: clock[0])
    cache: Any = Lists(clock, lasts, alive=alive)
    await handlers.listed(cache)
    assert clock[0] == waited
