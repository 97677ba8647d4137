"""Errors in OpenAI's shape."""

import json
from typing import Any

from aiohttp import web


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
    ) -> None:
        super().__init__(message)
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
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return web.json_response(self.body, status=self.status, headers=headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request", message, param=param)


def too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"The request's body is larger than {limit} bytes.")


def unknown_model(name: str) -> ApiError:
    return ApiError(
        404,
        "model_not_found",
        f"The model {name[:200]!r} does not exist. Models are named <namespace>/<route>; see GET /v1/models.",
        param="model",
    )


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
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = {}
    error = answer.get("error", answer) if isinstance(answer, dict) else {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    message = str(error.get("message") or error.get("detail") or f"the engine answered with status {status}")
    param = error.get("param")
    return ApiError(
        status,
        str(error.get("code") or status),
        message.replace(engine_model, name),
        kind=str(error.get("type") or "engine_error"),
        param=param if isinstance(param, str) else None,
    )
