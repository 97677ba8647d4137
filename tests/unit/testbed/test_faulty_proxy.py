"""The faulty proxy provides exactly the requested bandwidth. Measurements through it depend on that."""

import time

import aiohttp
import pytest
from aiohttp import web
from testbed.faults import Fault, Line, faulty_proxy
from worlds.serving import listening

WORK, OVERSLEPT = 50e-6, 1e-3  # seconds: reading and writing a piece, the delay of a sleep


class Time:
    """A clock that only sleep and work advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + OVERSLEPT


@pytest.mark.parametrize("rate", [100e3, 1e6, 15e6, 50e6, 100e6])
async def test_the_rate_is_the_requested_one(rate: float) -> None:
    at = Time()
    line, began = Line(rate, lambda: at.now, at.sleep), at.now
    assert line.piece / rate <= 0.01, "the pause before a piece is too short for a reader to notice"
    sent = 0
    while sent < 2 * rate:
        at.now += WORK
        await line.bring(line.piece)
        sent += line.piece
        due = began + sent / rate
        assert due - 1e-6 < at.now < due + 2 * (WORK + OVERSLEPT), "no piece is early, and delays do not add up"


async def test_a_delay_is_made_up_for_and_then_the_rate_holds_again() -> None:
    at = Time()
    line, began = Line(1e6, lambda: at.now, at.sleep), at.now
    at.now += 0.5  # the reader was busy
    for _ in range(50):
        await line.bring(10_000)
    assert at.now == began + 0.5, "the bytes of the missed half second come without a pause"
    await line.bring(10_000)
    assert at.now == pytest.approx(began + 0.51 + OVERSLEPT)


async def test_a_slow_line_delivers_all_bytes_and_not_too_early() -> None:
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
