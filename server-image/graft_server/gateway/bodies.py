"""The body of a request: the accounts that it counts against, how it is received, and the fields that are passed on.

A body is received while the bytes in flight allow it. A large body is parsed beside the event loop, one at a time.
"""

import asyncio
from typing import Any

from aiohttp import web
from graft.bounded import Limits, OutOfBounds, parse_json
from graft.contracts.enginekeys import fingerprint

from graft_server.gateway import fields
from graft_server.gateway.callers import HEADER, Proxies
from graft_server.gateway.errors import ApiError, bad_request
from graft_server.gateway.settings import Settings
from graft_server.inflight import Account, Share, weight
from graft_server.receiving import Refused, receive
from graft_server.threads import in_thread

CODES = {400: "invalid_request", 408: "request_timeout", 413: "request_too_large", 415: "unsupported_encoding"}
SMALL = 64 * 1024  # bytes; parsing a smaller body takes less time than a change of threads


class Bodies:
    """The reader of the bodies of one gateway."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._proxies = Proxies(settings.trusted_proxies)
        self._limits = Limits(settings.max_body_bytes, settings.max_body_depth, settings.max_body_values)
        self._parsing = asyncio.Lock()  # a large body becomes many objects: one at a time

    def caller(self, request: web.Request) -> str:
        """Return the address that a request counts for."""
        return self._proxies.caller(request.remote or "unknown", request.headers.getall(HEADER, []))

    def accounts(self, request: web.Request) -> tuple[Account, ...]:
        """Return the accounts of a request's caller, the narrowest first.

        Without authentication, a caller may invent keys. The account of the address bounds the bytes of all its keys
        together.
        """
        settings, address = self._settings, self.caller(request)
        key = request.headers.get("Authorization", "")
        everybody = Account("everybody", "all clients", settings.max_bytes_in_flight, shared=True)
        if not key:
            return Account(f"peer {address}", "your address", settings.max_bytes_per_caller), everybody
        digest = fingerprint(key)
        return (
            Account(f"key {digest}", "your key", settings.max_bytes_per_caller),
            Account(f"peer {address}", "your address", settings.max_bytes_per_peer),
            everybody,
        )

    async def payload(self, request: web.Request, path: str, share: Share) -> dict[str, Any]:
        """Return the model and the fields that are passed on. `path` is the route.

        Raises ApiError 4xx, and Full if too many bytes are in flight.
        """
        try:
            body = await receive(request, self._settings.max_body_bytes, self._settings.body_timeout, share)
        except Refused as error:
            raise ApiError(error.status, CODES[error.status], str(error)) from error
        share.add(weight(body, self._limits.values))
        if len(body) <= SMALL:
            return parsed(body, path, self._limits)
        return await in_thread(self._parsing, parsed, body, path, self._limits)


def parsed(body: bytes, path: str, limits: Limits) -> dict[str, Any]:
    """Return the fields of a body that are passed on, with the model (PURE). Raises ApiError 400."""
    try:
        payload = parse_json(body, limits, "The request's body")
    except OutOfBounds as error:
        raise bad_request(f"{error}.") from error
    if not isinstance(payload, dict):
        raise bad_request("The request's body must be a JSON object.")
    name = payload.get("model")
    if not isinstance(name, str) or not name:
        raise bad_request("The request has no model. Set model to <namespace>/<route>.", "model")
    return fields.passed_on(payload, path)
