"""Requests to a sequence of adapters: each step's answer is the next step's question. The client gets the last answer.

The steps before the last are not streamed. They take only the sampling fields and the token limit from the request.
The fields that shape the answer (n, stop, tools, logprobs, streaming) apply to the last step only. If the client
disconnects, the running step is cancelled.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from aiohttp import web
from graft.contracts.gateway import Backend

from graft_server.gateway.errors import ApiError, bad_request, unavailable, upstream_broke
from graft_server.gateway.proxy import Call, Proxy
from graft_server.gateway.rewrite import TOKENS, add_usage
from graft_server.gateway.table import Model

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
LIMITS = ("max_tokens", "max_completion_tokens")


async def answer_in_steps(
    proxy: Proxy, call: Call, newest: Callable[[], Model | None], step_tokens: int
) -> web.StreamResponse:
    """Return the answer of the last step.

    Raises an ApiError that names the failed step. Nothing has been sent to the client then.
    `newest` returns the model from the current table: each step uses the version that is routed when the step begins.
    """
    if call.model.why_not is not None:
        raise unavailable(call.model.name, call.model.why_not)
    _check(call.payload)
    count = len(call.model.steps)
    for index in range(count):
        model = newest() or call.model
        target = (model if len(model.steps) == count else call.model).steps[index]
        last = index == count - 1
        payload = call.payload if last else inner_payload(call.payload, step_tokens)
        step = replace(call, target=target, payload=payload, for_client=last)
        where = f"step {index + 1} of {count} ({target.adapter})"
        try:
            response = await proxy.answer(step, partial(_replicas, newest, step))
        except ApiError as error:
            raise _named(error, where) from error
        if last:
            return response
        text, done = _text(response, where)
        usage = done.get("usage")
        spent = add_usage(call.spent, usage if isinstance(usage, dict) else {})
        entry = step.step | {"finish_reason": done["choices"][0].get("finish_reason")}
        call = replace(
            call,
            payload=_asking(call.payload, text),
            before=[*call.before, entry],
            spent={name: int(spent[name]) for name in TOKENS},
        )
    raise AssertionError("a sequence must have at least one step")


def inner_payload(payload: dict[str, Any], step_tokens: int) -> dict[str, Any]:
    """Return the request body for a step before the last (PURE)."""
    limit = {name: payload[name] for name in LIMITS if payload.get(name) is not None}
    question = {name: payload[name] for name in ("messages", "prompt") if name in payload}
    return (
        question
        | {name: payload[name] for name in SAMPLING if name in payload}
        | (limit or {"max_tokens": step_tokens})
    )


def _replicas(newest: Callable[[], Model | None], step: Call) -> tuple[Backend, ...]:
    return (newest() or step.model).replicas(step.target)


def _asking(payload: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the request with `text` as its question."""
    if "messages" in payload:
        return payload | {"messages": [{"role": "user", "content": text}]}
    return payload | {"prompt": text}


def _check(payload: dict[str, Any]) -> None:
    prompt = payload.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(item, int) for item in prompt):
        raise bad_request("A sequence of adapters accepts only one prompt per request.", "prompt")


def _text(response: web.StreamResponse, where: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a step's answer, and the parsed answer."""
    body = response.body if isinstance(response, web.Response) else None
    try:
        answer = json.loads(body if isinstance(body, bytes) else b"")
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise upstream_broke(f"{where} returned an invalid answer, so the next step has no question") from error
    if not isinstance(text, str) or not text.strip():
        raise upstream_broke(f"{where} returned an empty answer, so the next step has no question")
    return text, answer


def _named(error: ApiError, where: str) -> ApiError:
    return ApiError(
        error.status, error.code, f"{where}: {error}", kind=error.kind, param=error.param, retry_after=error.retry_after
    )
