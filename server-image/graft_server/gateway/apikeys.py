"""Who may call the gateway: the API keys that it accepts, and the models that each of them opens.

The operator publishes one grant for each ApiKey, with the SHA-256 of its keys. A key may have grants of several namespaces,
if each of them names its sum. Each grant opens models of its own namespace only. What a caller may not use does not exist
for it.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from graft.bounded import OutOfBounds
from graft.contracts.apikeys import GRANT_KEY, Accepted, Grant
from graft.contracts.enginekeys import fingerprint
from graft.contracts.usage import tenant_usage_key, usage_key

from graft_server.gateway.errors import unauthorized
from graft_server.gateway.ledger import Limit

log = logging.getLogger(__name__)

LONGEST_HEADER = 1024  # characters
TICK_SECONDS = 1.0  # within which a running answer ends after its key


@dataclass(frozen=True)
class Caller:
    """The sender of a request. Without a key it is anybody, who may use every model."""

    key: bytes | None  # where the grants of its key are
    names: tuple[str, ...] = ()  # <namespace>/<name> of its ApiKeys, for the log


ANYBODY = Caller(None)  # where clients need no key
NOBODY = Caller(b"")  # who may use nothing


@dataclass(frozen=True)
class Opened:
    """One grant, as the key with one sum has it."""

    grant: Grant
    accepted: Accepted
    models: frozenset[str] | None

    def valid(self, now: float) -> bool:
        """Return whether the key works at a time, in seconds since 1970."""
        return all(end is None or now < end for end in (self.accepted.until, self.grant.expires))

    def opens(self, model: str) -> bool:
        """Return whether the grant names a model."""
        if model.partition("/")[0] != self.grant.namespace:
            return False
        return self.models is None or model in self.models


@dataclass
class Running:
    """One request that is being answered. `ends`: whether the answer ends when its key does not work any more."""

    caller: Caller
    model: str
    ends: bool


class ApiKeys:
    """The keys that one gateway accepts, as the operator published them last."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.read = False  # whether the API server has answered, even if there are no keys
        self._clock = clock
        # Sums are found by an HMAC with a secret of this process. So the time of a search tells nothing about a sum.
        self._secret = secrets.token_bytes(32)
        self._texts: dict[str, str] = {}  # by ConfigMap
        self._grants: dict[str, Grant] = {}  # by ConfigMap: the last valid one
        self._opened: dict[bytes, dict[str, Opened]] = {}  # place of a sum -> ConfigMap -> grant
        self._running: dict[asyncio.Timeout, Running] = {}

    def update(self, configmaps: Mapping[str, Mapping[str, str]]) -> None:
        """Take the grants. A Follower calls this. An invalid grant opens nothing."""
        self.read = True
        for name in self._texts.keys() - configmaps.keys():
            del self._texts[name]
            self._remove(name)
        for name, data in configmaps.items():
            text = data.get(GRANT_KEY) or ""
            if self._texts.get(name) == text:
                continue
            self._texts[name] = text
            self._remove(name)
            try:
                grant = Grant.read(text)
            except OutOfBounds as error:
                log.error("ConfigMap %s is invalid, its keys are refused: %s", name, error)
                continue
            self._grants[name] = grant
            models = None if grant.models is None else frozenset(grant.models)
            for accepted in grant.keys:
                place = self._place(accepted.sha256)
                self._opened.setdefault(place, {})[name] = Opened(grant, accepted, models)
        self.end_running()

    def caller(self, authorization: str | None) -> Caller:
        """Return who sends a request with this header. Raises ApiError 401."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if authorization is None or scheme.lower() != "bearer" or not key:
            raise unauthorized("No API key was sent. Send the header Authorization: Bearer <key>.")
        found: list[Opened] = []
        place = b""
        if len(authorization) <= LONGEST_HEADER:
            digest = fingerprint(key)
            place = self._place(digest)
            same = self._opened.get(place, {}).values()
            found = [item for item in same if hmac.compare_digest(item.accepted.sha256, digest)]
        if not found:
            raise unauthorized("The API key is not valid. It may have been revoked.")
        if not (valid := [item for item in found if item.valid(self._clock())]):
            raise unauthorized("The API key has expired.")
        return Caller(place, tuple(sorted(f"{item.grant.namespace}/{item.grant.name}" for item in valid)))

    def opens(self, caller: Caller, model: str) -> bool:
        """Return whether a caller may use a model now."""
        return caller is ANYBODY or bool(self._opening(caller, model))

    def limits(self, caller: Caller, model: str) -> list[Limit]:
        """Return the limits that hold for a caller of a model: the key's, and its team's.

        If several ApiKeys of the namespace have the caller's key, the first by name counts.
        """
        opening = sorted((item.grant for item in self._opening(caller, model)), key=lambda grant: grant.name)
        found: list[Limit] = []
        for grant in opening[:1]:
            if grant.allowance is not None:
                found.append(Limit(usage_key(grant.namespace, grant.name), grant.allowance, "The API key"))
            if grant.tenant is not None and grant.tenant_allowance is not None:
                found.append(Limit(tenant_usage_key(grant.tenant), grant.tenant_allowance, "The team"))
        return found

    def models(self, caller: Caller) -> Mapping[str, frozenset[str] | None] | None:
        """Return the namespaces whose models a caller may use, each with the models; None: all. None: everything."""
        if caller is ANYBODY:
            return None
        found: dict[str, frozenset[str] | None] = {}
        for item in self._valid(caller):
            there = found.get(item.grant.namespace, frozenset())
            found[item.grant.namespace] = None if there is None or item.models is None else there | item.models
        return found

    @asynccontextmanager
    async def held(self, caller: Caller, model: str) -> AsyncIterator[None]:
        """Do the work of a request. Raises ApiError 401 if its key ends meanwhile, and its ApiKey says that answers end, too."""
        if caller is ANYBODY:
            yield
            return
        try:
            async with asyncio.timeout(None) as limit:
                ends = any(item.grant.end_streams for item in self._opening(caller, model))
                self._running[limit] = Running(caller, model, ends)
                try:
                    yield
                finally:
                    del self._running[limit]
        except TimeoutError:
            if limit.expired():
                raise unauthorized("The API key was revoked or has expired, and its answers end with it.") from None
            raise

    async def watch(self) -> None:
        """End answers whose key expires, without end."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.end_running()

    def end_running(self) -> None:
        """End the running answers whose key does not work any more."""
        for limit, running in list(self._running.items()):
            if opening := self._opening(running.caller, running.model):
                running.ends = any(item.grant.end_streams for item in opening)
            elif running.ends:
                limit.reschedule(asyncio.get_running_loop().time())

    def _opening(self, caller: Caller, model: str) -> list[Opened]:
        return [item for item in self._valid(caller) if item.opens(model)]

    def _valid(self, caller: Caller) -> Iterator[Opened]:
        now = self._clock()
        return (item for item in self._opened.get(caller.key or b"", {}).values() if item.valid(now))

    def _place(self, sha256: str) -> bytes:
        return hmac.new(self._secret, sha256.encode(), hashlib.sha256).digest()

    def _remove(self, name: str) -> None:
        grant = self._grants.pop(name, None)
        for accepted in grant.keys if grant else ():
            place = self._place(accepted.sha256)
            there = self._opened.get(place, {})
            there.pop(name, None)
            if not there:
                self._opened.pop(place, None)
