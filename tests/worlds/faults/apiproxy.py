"""A proxy between the operator and the API server. It understands verbs, resources and the events of watches."""

import asyncio
import json
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import aiohttp
from aiohttp import web
from testbed.faults import HOP_BY_HOP, Fault, FaultyProxy

WRITES = frozenset({"create", "apply", "patch", "update", "delete"})
PATH = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)/(?:namespaces/(?P<namespace>[^/]+)/(?!status|finalize))?(?P<rest>.+)")
VERBS = {"POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}
LOOK_AGAIN = 0.05  # seconds after which a held event is judged again


@dataclass(frozen=True)
class Call:
    """One request to the API server. `str()` gives a text such as `apply finetunejobs/status team-a/first`."""

    verb: str  # of RBAC, and `apply` for server-side apply
    resource: str  # plural, with the subresource
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource} {self.namespace}/{self.name}"


def call_of(method: str, path: str, content_type: str = "") -> Call:
    """Return what a request does."""
    parts = urlsplit(path)
    found = PATH.fullmatch(unquote(parts.path))
    namespace, rest = (found["namespace"] or "", found["rest"].split("/")) if found else ("", [parts.path])
    resource, name = "/".join([rest[0], *rest[2:]]), rest[1] if len(rest) > 1 else ""
    if method == "GET":
        query = parse_qs(parts.query)
        verb = "watch" if query.get("watch", [""])[0] in {"true", "1"} else "get" if name else "list"
    else:
        verb = "apply" if "apply-patch" in content_type else VERBS.get(method, method.lower())
    return Call(verb, resource, namespace, name)


class Verdict(Enum):
    """What happens to one event of a watch."""

    PASS = "pass"
    DROP = "drop"
    HOLD = "hold"  # it waits, and the later events of this watch behind it, until the verdict is another
    BEHIND = "behind"  # it comes after the next event of this watch
    AGAIN = "again"  # it comes now, and once more after the next event of this watch


@dataclass(frozen=True)
class Waiting:
    """The event that is next in one watch."""

    watch: Call
    type: str
    item: dict[str, Any]
    age: float  # seconds since the API server sent it
    superseded: bool  # a later event about the same name waits, too


Gate = Callable[[Waiting], Verdict]


@dataclass(eq=False)
class _Stream:
    """One watch that the operator holds open."""

    call: Call
    mute: bool = False  # no byte comes any more, and the connection stays open
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    events: deque[tuple[float, dict[str, Any]]] = field(default_factory=deque)  # with the time of each

    def next(self) -> Waiting:
        came, event = self.events[0]
        item = event["object"]
        name = _name(item)
        later = any(_name(other["object"]) == name for _, other in list(self.events)[1:])
        return Waiting(self.call, event["type"], item, time.monotonic() - came, bool(name) and later)

    ended: bool = False  # by the API server
    last: bytes | None = None  # an event to send instead of all that wait; then the watch ends


def _name(item: dict[str, Any]) -> str:
    metadata = item.get("metadata") or {}
    return f"{metadata.get('namespace')}/{metadata['name']}" if metadata.get("name") else ""


class ApiProxy(FaultyProxy):
    """A running proxy. `Fault.match` is looked for in the text of a Call."""

    def __init__(self, upstream: str, ca: Path | None = None) -> None:
        super().__init__(upstream, ssl.create_default_context(cafile=str(ca)) if ca else None)
        self.calls: list[tuple[float, Call]] = []  # with the time (time.monotonic) of each
        self._gate: Gate = lambda waiting: Verdict.PASS
        self._streams: set[_Stream] = set()
        self._stale: str | None = None  # the resourceVersion of which lists show the state

    def gate(self, gate: Gate) -> None:
        """Judge every event of every watch, also those that wait, by this function."""
        self._gate = gate
        self._loop.call_soon_threadsafe(self._wake)

    def open(self) -> None:
        """Let all events pass. Lists are current again."""
        self._stale = None
        self.gate(lambda waiting: Verdict.PASS)

    def freeze(self, version: str) -> None:
        """Show the state of this resourceVersion in every list, and no event in any watch, until `open`."""
        self._stale = version
        self.gate(lambda waiting: Verdict.HOLD)

    def half_open(self) -> None:
        """Send nothing more in the watches that are open now. Their connections stay open. New watches work."""
        for stream in list(self._streams):
            stream.mute = True

    def end_watches(self, match: str, code: int) -> None:
        """End the watches whose Call contains `match` with an ERROR event. The events that wait are lost."""
        reason = {410: "Expired"}.get(code, "InternalError")
        status = {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "injected",
        }  # fmt: skip
        line = json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"

        def end() -> None:
            for stream in self._streams:
                if match in str(stream.call):
                    stream.last = line
            self._wake()

        self._loop.call_soon_threadsafe(end)

    def count(self, verbs: frozenset[str] = WRITES, about: str = "") -> int:
        """Return the number of requests with these verbs whose text contains `about`."""
        return sum(call.verb in verbs and about in str(call) for _, call in list(self.calls))

    def watches(self) -> list[str]:
        """Return the watches that are open."""
        return [str(stream.call) for stream in list(self._streams)]

    def _wake(self) -> None:
        for stream in self._streams:
            stream.wake.set()

    def _call(self, request: web.Request) -> Call:
        return call_of(request.method, request.raw_path, request.headers.get("Content-Type", ""))

    def _subject(self, request: web.Request) -> str:
        call = self._call(request)
        self.calls.append((time.monotonic(), call))
        return str(call)

    def _path(self, request: web.Request) -> str:
        path, call = request.raw_path, self._call(request)
        if call.verb == "list" and self._stale is not None and "continue=" not in path:
            exact = f"resourceVersion={self._stale}&resourceVersionMatch=Exact"
            path += f"{'&' if '?' in path else '?'}{exact}"
        return path

    def _refusal(self, fault: Fault) -> tuple[str, str]:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": fault.status,
            "message": "injected",
        }
        return json.dumps(status | {"reason": fault.code}), "application/json"

    async def _pass_on(self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault) -> web.StreamResponse:
        call = self._call(request)
        if call.verb != "watch" or answer.status != 200:
            return await super()._pass_on(request, answer, fault)
        headers = {key: value for key, value in answer.headers.items() if key.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        stream = _Stream(call)
        self._streams.add(stream)
        reader = asyncio.create_task(_read(answer, stream))
        try:
            await self._pass_events(stream, response)
        finally:
            self._streams.discard(stream)
            reader.cancel()
        return response

    async def _pass_events(self, stream: _Stream, response: web.StreamResponse) -> None:
        behind = b""
        while stream.last is None:
            stream.wake.clear()
            if stream.mute or not stream.events:
                if stream.ended and not stream.mute:
                    return
                await stream.wake.wait()
                continue
            verdict = self._gate(stream.next())
            if verdict is Verdict.HOLD:
                await asyncio.sleep(LOOK_AGAIN)
                continue
            line = json.dumps(stream.events.popleft()[1]).encode() + b"\n"
            if verdict is Verdict.BEHIND and not behind:
                behind = line
            elif verdict is not Verdict.DROP:
                await response.write(line + behind)
                behind = line if verdict is Verdict.AGAIN else b""
        await response.write(stream.last)


async def _read(answer: aiohttp.ClientResponse, stream: _Stream) -> None:
    """Put the lines of a watch into its stream. The API server or a cut connection ends it."""
    held = b""
    try:
        async for piece in answer.content.iter_any():
            *lines, held = (held + piece).split(b"\n")
            stream.events += [(time.monotonic(), json.loads(line)) for line in lines if line]
            stream.wake.set()
    except aiohttp.ClientError:
        pass  # the API server was killed; the operator sees the end of its watch, too
    stream.ended = True
    stream.wake.set()
