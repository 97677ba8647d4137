"""Who may call an engine: a caller has a key, a key has a role, and a role has routes.

The CPU engine imports this module. For vLLM, the agent copies this one file into the pod, and the flag --middleware names
its class OnlyCallers. So it imports only the standard library. It works once per request, and on no part of an answer.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

AGENT, GATEWAY = "agent", "gateway"
FREE = ("GET", "/health")  # the kubelet's probes have no key
# Every other route is closed for both: an engine may have routes that change or show its state (vLLM's /sleep, /server_info).
ROUTES = {
    AGENT: frozenset(
        {
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/version"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
            ("POST", "/v1/completions"),  # to check the effect of a loaded adapter
        }
    ),
    GATEWAY: frozenset({("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}),
}
CALLERS_VARIABLE = "GRAFT_CALLERS"  # path of the file with the callers, for vLLM
FILE_BYTES = 64 * 1024
LONGEST_KEY = 512  # bytes of the header Authorization
UNAUTHORIZED, FORBIDDEN = 401, 403
MESSAGES = {
    UNAUTHORIZED: "This engine answers only callers that know its key. Send requests to Graft's gateway.",
    FORBIDDEN: "The key does not allow this route.",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Callers:
    """The callers of one engine, in a file that the agent replaces when they change.

    The file holds the SHA-256 of keys: {"agent": ["…"], "gateway": ["…"]}. If `gateway` is null, gateways need no key. If
    the file does not exist or is invalid, nobody may call.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._seen: tuple[int, ...] | None = None  # what stat said of the file that was read last
        self._keys: dict[str, list[str]] = {}
        self._open = False

    def refusal(self, method: str, path: str, authorization: bytes | None) -> int | None:
        """Return the status to refuse a request with, or None if the caller may send it."""
        route = (method, path)
        if route == FREE:
            return None
        self._read()
        roles = self._roles(authorization)
        if any(route in ROUTES[role] for role in roles) or (self._open and route in ROUTES[GATEWAY]):
            return None
        return FORBIDDEN if roles else UNAUTHORIZED

    def _roles(self, authorization: bytes | None) -> set[str]:
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or len(key) > LONGEST_KEY:
            return set()
        given = hashlib.sha256(key.strip()).hexdigest()
        return {role for role, known in self._keys.items() for one in known if hmac.compare_digest(given, one)}

    def _read(self) -> None:
        """Read the file if it has changed."""
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return
            with self._path.open("rb") as file:
                self._keys, self._open = _parse(file.read(FILE_BYTES))
            self._seen = seen
        except (OSError, ValueError, TypeError):
            self._keys, self._open, self._seen = {}, False, None


def _parse(text: bytes) -> tuple[dict[str, list[str]], bool]:
    callers = json.loads(text)
    keys = {role: callers[role] or [] for role in ROUTES if role in callers}
    if not all(isinstance(one, str) and one.isascii() for known in keys.values() for one in known):
        raise ValueError("a key is not a text")
    return keys, GATEWAY in callers and callers[GATEWAY] is None


def error(status: int) -> dict[str, Any]:
    """Return the body of a refusal, in OpenAI's shape."""
    kind = "authentication_error" if status == UNAUTHORIZED else "permission_error"
    return {"error": {"message": MESSAGES[status], "type": kind, "param": None, "code": status}}


class OnlyCallers:
    """The same as an ASGI application around another, for vLLM. vLLM creates it with the application only."""

    def __init__(self, app: App, callers: Callers | None = None) -> None:
        self._app = app
        self._callers = callers or Callers(os.environ[CALLERS_VARIABLE])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it. No route of an engine that a caller needs is a WebSocket."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif status := self._callers.refusal(scope["method"], scope["path"], _authorization(scope["headers"])):
            body = json.dumps(error(status)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            if status == UNAUTHORIZED:
                headers.append((b"www-authenticate", b"Bearer"))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await self._app(scope, receive, send)


def _authorization(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    return next((value for name, value in headers if name.lower() == b"authorization"), None)
