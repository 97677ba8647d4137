"""The faulty proxy gives the bandwidth that was asked for: what is measured through it depends on that."""

import time

import aiohttp
import pytest
from aiohttp import web
from testbed.faults import Fault, Line, faulty_proxy
from worlds.serving import listening

WORK, OVERSLEPT = 50e-6, 1e-3  # seconds that reading and writing a piece takes, and that a sleep takes too long


class Time:
    """A clock that only sleep and work move."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + OVERSLEPT


@pytest.mark.parametrize("rate", [100e3, 1e6, 15e6, 50e6, 100e6])
async def test_the_rate_is_the_one_asked_for(rate: float) -> None:
    at = Time()
    line, began = Line(rate, lambda: at.now, at.sleep), at.now
    assert line.piece / rate <= 0.01, "no piece comes after a pause that a reader would notice"
    sent = 0
    while sent < 2 * rate:
        at.now += WORK
        await line.bring(line.piece)
        sent += line.piece
        due = began + sent / rate
        assert due - 1e-6 < at.now < due + 2 * (WORK + OVERSLEPT), "never early, and no delay adds up"


async def test_what_took_longer_is_made_up_for_and_no_more() -> None:
    at = Time()
    line, began = Line(1e6, lambda: at.now, at.sleep), at.now
    at.now += 0.5  # a reader that was busy
    for _ in range(50):
        await line.bring(10_000)
    assert at.now == began + 0.5, "half a second's bytes are due"
    await line.bring(10_000)
    assert at.now == pytest.approx(began + 0.51 + OVERSLEPT)


async def test_a_slow_line_brings_everything_and_not_too_soon() -> None:
    data = bytes(range(256)) * 2000

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=data)

    app = web.Application()
    app.router.add_get("/slow", answer)
    async with listening(app) as address, aiohttp.ClientSession() as session:
        with faulty_proxy(f"http://{address}") as proxy:
            proxy.inject(Fault(bytes_per_second=len(data)))
            began = time.monotonic()
            async with session.get(f"{proxy.endpoint}/slow") as response:
                assert await response.read() == data
            assert time.monotonic() - began >= 0.9
