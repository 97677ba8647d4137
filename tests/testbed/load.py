"""A load generator. Its clients send plain and streamed requests through the gateway without pause, and check every answer.

A request has failed if its status is not 200, or if its stream breaks or ends without [DONE]. It has also failed if another
version answered, by the version that the gateway names or by the text. Requests are greedy and seeded, so that each version
of each model has exactly one right answer. Time and number of requests are limited.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MOST_SECONDS = 600.0
MOST_REQUESTS = 50_000
PATIENCE = aiohttp.ClientTimeout(total=60)
GONE = "gone"  # the answer for a model that was removed: 404, model_not_found


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request. `failure` is None if it succeeded. `answered` is the version that answered, or GONE."""

    model: str
    stream: bool
    began: float
    ended: float
    answered: str | None
    failure: str | None


@dataclass
class Load:
    """The requests to send, and their outcomes. The right answers may be changed while the clients run."""

    url: str  # of the gateway
    body: dict[str, Any]  # of each request, without model and stream
    clients: int = 4
    pause: float = 0.02  # seconds that each client waits between two requests
    streamed: float = 0.5  # the share of requests that are streamed
    outcomes: list[Outcome] = field(default_factory=list)
    streams: int = 0  # streamed requests in flight
    _right: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> version -> text
    _end: threading.Event = field(default_factory=threading.Event)

    def expect(self, model: str, answers: dict[str, str]) -> None:
        """Request a model from now on, or change its right answers: version -> text. With GONE the model may be unknown."""
        self._right = {**self._right, model: answers}

    @property
    def failures(self) -> list[Outcome]:
        return [one for one in list(self.outcomes) if one.failure is not None]

    def answers(self, model: str, since: float = 0.0) -> Counter[str]:
        """Count the answers to requests that began at `since` or later: version -> number."""
        found = [one for one in list(self.outcomes) if one.model == model and one.began >= since and one.answered]
        return Counter(str(one.answered) for one in found)

    async def run(self) -> None:
        """Send requests until `stop` is called or a limit is reached."""
        deadline = time.monotonic() + MOST_SECONDS
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            await asyncio.gather(
                *(self._client(session, random.Random(index), deadline) for index in range(self.clients))
            )

    def stop(self) -> None:
        self._end.set()

    async def _client(self, session: aiohttp.ClientSession, chance: random.Random, deadline: float) -> None:
        while not self._end.is_set() and time.monotonic() < deadline and len(self.outcomes) < MOST_REQUESTS:
            if right := self._right:
                model = chance.choice(sorted(right))
                self.outcomes.append(
                    await self._ask(session, model, right[model], stream=chance.random() < self.streamed)
                )
            await asyncio.sleep(self.pause)

    async def _ask(self, session: aiohttp.ClientSession, model: str, right: dict[str, str], *, stream: bool) -> Outcome:
        began = time.monotonic()
        answered, failure = None, None
        self.streams += stream
        try:
            async with session.post(
                f"{self.url}/v1/completions", json={**self.body, "model": model, "stream": stream}
            ) as response:
                if response.status == 200:
                    version, text = await (_read_stream(response) if stream else _read_plain(response))
                    answered = version
                    if version not in right:
                        failure = f"version {version} answered, expected one of {sorted(right)}"
                    elif text != right[version]:
                        failure = f"version {version} answered {text!r}, expected {right[version]!r}"
                else:
                    said = await response.text()
                    if response.status == 404 and GONE in right and '"model_not_found"' in said:
                        answered = GONE
                    else:
                        failure = f"status {response.status}: {said}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
            failure = repr(error)
        self.streams -= stream
        return Outcome(model, stream, began, time.monotonic(), answered, failure)


async def _read_plain(response: aiohttp.ClientResponse) -> tuple[str, str]:
    answer = await response.json()
    return str(answer["graft"]["version"]), str(answer["choices"][0]["text"])


async def _read_stream(response: aiohttp.ClientResponse) -> tuple[str, str]:
    """Return the version and the text of a streamed answer. Raises ValueError if the stream breaks off."""
    version, text, done = None, "", False
    async for raw in response.content:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data:"):
            event = json.loads(line[5:])
            if "error" in event:
                raise ValueError(f"the stream ended with {line}")
            version = version or event["graft"]["version"]
            text += "".join(choice["text"] for choice in event["choices"])
    if not done:
        raise ValueError(f"the stream ended without [DONE] after {text!r}")
    return str(version), text


@contextmanager
def under_load(load: Load) -> Iterator[Load]:
    """Run the clients in a thread during the block. At its end they finish their open requests."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run()), name="load", daemon=True)
    thread.start()
    try:
        yield load
    finally:
        load.stop()
        thread.join(PATIENCE.total)
