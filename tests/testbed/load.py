"""A load generator: clients that ask through the gateway without pause, plain and streamed, and check every answer.

A request has failed when it has no status 200, when its stream breaks or ends without [DONE], or when the answer is another
version's: by what the gateway says about who answered, and by the text itself. Requests are greedy and seeded, so that each version
of each model has exactly one right answer. Bounded in time and count.
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
GONE = "gone"  # what a model that was taken away answers: 404, unknown model


@dataclass(frozen=True)
class Outcome:
    """One request. `failure` is None when all was right; `answered` the version that answered, or GONE."""

    model: str
    stream: bool
    began: float
    ended: float
    answered: str | None
    failure: str | None


@dataclass
class Load:
    """What is asked, and what came of it. Right answers may be changed while the clients run."""

    url: str  # of the gateway
    body: dict[str, Any]  # of each request, without model and stream
    clients: int = 4
    pause: float = 0.02  # seconds of each client between two requests
    streamed: float = 0.5  # share of the requests
    outcomes: list[Outcome] = field(default_factory=list)
    streams: int = 0  # in flight now
    _right: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> version -> text
    _end: threading.Event = field(default_factory=threading.Event)

    def expect(self, model: str, answers: dict[str, str]) -> None:
        """Ask a model from now on, or change what its right answers are: version -> text; GONE: it may be unknown."""
        self._right = {**self._right, model: answers}

    @property
    def failures(self) -> list[Outcome]:
        return [one for one in list(self.outcomes) if one.failure is not None]

    def answers(self, model: str, since: float = 0.0) -> Counter[str]:
        """version -> number of right answers to requests that began since then."""
        found = [one for one in list(self.outcomes) if one.model == model and one.began >= since and one.answered]
        return Counter(str(one.answered) for one in found)

    async def run(self) -> None:
        """Until `stop`, or a bound."""
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
                        failure = f"{version} answered, right are {sorted(right)}"
                    elif text != right[version]:
                        failure = f"{version} answered {text!r}, not {right[version]!r}"
                else:
                    said = await response.text()
                    if response.status == 404 and GONE in right and '"model_not_found"' in said:
                        answered = GONE
                    else:
                        failure = f"{response.status}: {said}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
            failure = repr(error)
        self.streams -= stream
        return Outcome(model, stream, began, time.monotonic(), answered, failure)


async def _read_plain(response: aiohttp.ClientResponse) -> tuple[str, str]:
    answer = await response.json()
    return str(answer["graft"]["version"]), str(answer["choices"][0]["text"])


async def _read_stream(response: aiohttp.ClientResponse) -> tuple[str, str]:
    """ValueError when it breaks off."""
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
    """The clients run in a thread; at the end they finish what they have asked."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run()), name="load", daemon=True)
    thread.start()
    try:
        yield load
    finally:
        load.stop()
        thread.join(PATIENCE.total)
