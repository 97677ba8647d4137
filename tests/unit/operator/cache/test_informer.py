"""How long an informer waits after failures, and what it asks for then."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from graft.cache import informer
from graft.cache.cache import Cache, Source
from graft.cache.informer import PAUSE_FIRST, PAUSE_LAST, PAUSE_LISTED, Pause, outdated
from graft.kinds import WrongAnswer
from graft.kube import KubeError, Page


def pauses(pause: Pause, count: int) -> list[float]:
    return [pause.seconds() for _ in range(count)]


def test_failed_lists_are_repeated_less_and_less_often() -> None:
    pause = Pause()
    pause.listing()
    assert pauses(pause, 8) == [0.5, 1, 2, 4, 8, 16, PAUSE_LAST, PAUSE_LAST]


def test_while_lists_succeed_a_watch_that_fails_hides_changes_for_seconds_only() -> None:
    pause = Pause()
    pause.listed(0, 0.1)
    assert pauses(pause, 6) == [0.5, 1, 2, 4, PAUSE_LISTED, PAUSE_LISTED]


def test_a_list_that_takes_long_is_not_repeated_often() -> None:
    pause = Pause()
    pause.listed(0, 2)
    pause.received(5)  # one event between two lists is no sign that the watch works
    assert pauses(pause, 7) == [0.5, 1, 2, 4, 8, 16, 20]
    pause.listed(0, 50)
    assert pause.seconds() == PAUSE_LAST


def test_an_event_ends_the_back_off() -> None:
    pause = Pause()
    pause.listed(0, 0.1)
    pauses(pause, 6)
    pause.received(2)
    assert pauses(pause, 2) == [PAUSE_FIRST, 2 * PAUSE_FIRST]


def test_a_list_that_fails_after_good_ones_counts() -> None:
    pause = Pause()
    pause.listed(0, 0.1)
    pauses(pause, 6)
    pause.listing()
    assert pauses(pause, 3) == [10, 20, PAUSE_LAST]


@pytest.mark.parametrize("status", [400, 404, 410, 500, 504])
def test_a_refusal_that_may_be_about_the_version_asks_for_a_list(status: int) -> None:
    assert outdated(KubeError(status, "", "refused"))


@pytest.mark.parametrize(
    "error",
    [
        KubeError(429, "TooManyRequests", "later"),
        KubeError(503, "ServiceUnavailable", "later"),
        KubeError(0, "Unreachable", "no answer"),
        aiohttp.ClientPayloadError("cut"),
        TimeoutError(),
        ConnectionResetError(),
    ],
)
def test_an_api_server_in_trouble_is_not_asked_for_lists(error: Exception) -> None:
    assert not outdated(error)


@pytest.mark.parametrize("error", [WrongAnswer("other kind"), ValueError(), KeyError("object"), TypeError()])
def test_an_answer_that_cannot_be_read_asks_for_a_list(error: Exception) -> None:
    assert outdated(error)


EVENT = {
    "type": "ADDED",
    "object": {"metadata": {"namespace": "shop", "name": "a", "uid": "u", "resourceVersion": "101"}},
}
ERROR = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "injected"}}


class Restless:
    """An API server whose lists succeed, and whose watches end at once with an ERROR. The tenth sends an event first."""

    def __init__(self) -> None:
        self.lists = self.watches = 0

    async def pages(self, *_: Any, **__: Any) -> AsyncIterator[Page]:
        self.lists += 1
        yield Page([], "100", 10)

    async def events(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        self.watches += 1
        if self.watches == 10:
            yield EVENT
        yield ERROR


class Older:
    """An API server that does not list the kind."""

    def __init__(self, status: int) -> None:
        self.status = status

    async def pages(self, *_: Any, **__: Any) -> AsyncIterator[Page]:
        raise KubeError(self.status, "NotFound", "the server could not find the requested resource")
        yield


@pytest.mark.parametrize(
    ("optional", "status", "synced"), [(True, 404, True), (True, 403, False), (True, 500, False), (False, 404, False)]
)
async def test_a_kind_that_an_older_release_lacks_has_no_objects(
    monkeypatch: pytest.MonkeyPatch, optional: bool, status: int, synced: bool
) -> None:
    server: Any = Older(status)

    async def sleep(_: float) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    cache = Cache(server, [Source("ApiKey", optional=optional)])
    with pytest.raises(asyncio.CancelledError):
        await cache.informers["ApiKey"].run()
    assert (cache.missing() == []) == synced
    assert not synced or await cache.get("ApiKey", "shop", "web") is None


async def test_watches_that_end_again_and_again_hide_changes_for_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    server: Any = Restless()

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 12:
            raise asyncio.CancelledError

    monkeypatch.setattr(random, "uniform", lambda *_: 1.0)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(informer, "LIST_SHARE", 1e9)  # the list and the event come in the same millisecond
    cache = Cache(server, [Source("Adapter")])
    with pytest.raises(asyncio.CancelledError):
        await cache.informers["Adapter"].run()
    assert waited == [0.5, 1, 2, 4, *5 * [PAUSE_LISTED], 0.5, 1, 2]
    assert server.lists == 12 and cache.objects("Adapter").get("shop", "a") is None  # the next list did not have it
