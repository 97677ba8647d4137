"""Errors in OpenAI's shape."""

import math
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from graft.bounded import Limits, OutOfBounds, parse_json

from graft_server.inflight import Full

ENGINE_ERROR = Limits(64 * 1024, depth=8, values=1000)  # of an engine's error answer
MAX_MESSAGE = 4096  # characters of an engine's message that reach the client


class ApiError(Exception):
    """An error answer. Clients distinguish errors by `code`."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.status = status
        self.code = code
        self.kind = kind
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """Return the HTTP response."""
        headers = self.headers | ({} if self.retry_after is None else {"Retry-After": str(self.retry_after)})
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(self.body, status=self.status, headers=headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request", message, param=param)


def busy(error: Full) -> ApiError:
    """Return the 413 if the request alone is too large, the 429 if the caller has too many bytes in flight, or the 503
    if all callers together have too many.
    """
    if error.never:
        return ApiError(413, "request_too_large", f"The request needs too much memory: {error}.")
    if error.account.shared:
        return ApiError(503, "overloaded", f"The gateway is busy: {error}.", kind="service_unavailable", retry_after=2)
    return ApiError(
        429, "too_many_bytes_in_flight", f"Wait for earlier answers: {error}.", kind="rate_limit", retry_after=2
    )


def crowded() -> ApiError:
    """Return the 503 for a connection beyond the bound."""
    message = "The gateway has too many connections. Use fewer, and keep them open."
    return ApiError(503, "too_many_connections", message, kind="service_unavailable", retry_after=2)


def unknown_model(name: str) -> ApiError:
    return ApiError(
        404,
        "model_not_found",
        f"The model {name[:200]!r} does not exist. Models are named <namespace>/<route>; see GET /v1/models.",
        param="model",
    )


def unauthorized(message: str) -> ApiError:
    """Return the 401 for a request without a key that works, as OpenAI's API answers it."""
    return ApiError(401, "invalid_api_key", f"{message} An ApiKey of your namespace makes one.")


def exceeded(whose: str, what: str, limit: int | None, seconds: float, headers: Mapping[str, str]) -> ApiError:
    """Return the 429 for a request beyond a limit. `whose`: whose limit it is. `seconds`: until it may be sent again."""
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"{whose} may have {limit} {what}, and they are used up.",
        kind="rate_limit",
        retry_after=max(1, math.ceil(seconds)),
        headers=headers,
    )


def too_many_tokens(whose: str, what: str, limit: int, tokens: int) -> ApiError:
    """Return the 429 for a request that is larger than a limit. Waiting does not help."""
    return ApiError(
        429,
        "request_too_large",
        f"The request may need {tokens} tokens (its prompt and max_tokens). {whose} may have {limit} {what}. Set a smaller "
        f"max_tokens.",
        kind="rate_limit",
        param="max_tokens",
    )


def no_lease() -> ApiError:
    """Return the 429 while the gateway cannot ask how much of a limit is left."""
    message = "The gateway cannot reach the record of what was used, and has spent its own part of the limit."
    return ApiError(429, "limits_unavailable", message, kind="rate_limit", retry_after=2)


def no_route(method: str, path: str) -> ApiError:
    return ApiError(404, "not_found", f"The gateway has no route {method} {path[:200]}.")


def unavailable(name: str, reason: str, retry_after: int = 5) -> ApiError:
    return ApiError(
        503,
        "model_unavailable",
        f"{name} cannot answer now: {reason}",
        kind="service_unavailable",
        retry_after=retry_after,
    )


def timed_out(name: str, message: str) -> ApiError:
    return ApiError(504, "timeout", f"{name}: {message}", kind="timeout")


def upstream_broke(message: str) -> ApiError:
    return ApiError(502, "upstream_error", message, kind="server_error")


def engine_error(status: int, body: bytes, engine_model: str, name: str) -> ApiError:
    """Return the engine's error with the client's name of the model. `body` has the nested or the older flat shape."""
    try:
        answer = parse_json(body, ENGINE_ERROR, "the engine's error")
    except OutOfBounds:
        answer = {}
    error = answer.get("error", answer) if isinstance(answer, dict) else {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = str(error.get("message") or error.get("detail") or f"the engine answered with status {status}")
    param = error.get("param")
    return ApiError(
        status,
        str(error.get("code") or status)[:100],
        message[:MAX_MESSAGE].replace(engine_model, name),
        kind=str(error.get("type") or "engine_error")[:100],
        param=param[:100] if isinstance(param, str) else None,
    )
