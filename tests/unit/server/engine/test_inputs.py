"""Invalid or excessive requests to the engine.

They get a 4xx or 503 answer that names the problem. Other callers are not affected.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from graft_server.engine import __main__ as program
from graft_server.engine.generation import Engine
from worlds.engine import BASE, Api, make_adapter, running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


async def send(api: Api, body: str | bytes, path: str = COMPLETIONS, **headers: str) -> tuple[int, Any]:
    """Send a body unchanged."""
    async with api.client.post(path, data=body, headers={"Content-Type": "application/json", **headers}) as response:
        return response.status, await response.json()


VALUES = [
    ("temperature", "NaN"),
    ("temperature", "Infinity"),
    ("temperature", "1e400"),
    ("temperature", "1e300"),  # a valid number, but no logit is usable after it
    ("repetition_penalty", "1e-300"),
    ("repetition_penalty", "1e300"),
    ("top_p", "NaN"),
    ("logit_bias", '{"5": NaN}'),
    ("logit_bias", '{"x": 1}'),
    ("max_tokens", "-1"),
    ("max_tokens", "1" * 4000),
    ("max_tokens", "1.5"),
    ("n", "1" * 30),
    ("seed", "1.5"),
    ("stop", json.dumps(["x"] * 65)),
    ("prompt", "[1.5]"),
    ("prompt", '["a", 1]'),
    ("prompt", '{"a": 1}'),
    ("prompt", "[[99999999999999999999]]"),
    ("model", "5"),
    ("stream_options", '{"include_usage": "maybe"}'),
]


async def test_invalid_values_are_refused_with_the_name_of_the_field(api: Api) -> None:
    for field, value in VALUES:
        body = {"prompt": '"x"', "max_tokens": "3", "min_tokens": "1", field: value}
        status, answer = await send(api, "{" + ", ".join(f'"{name}": {text}' for name, text in body.items()) + "}")
        assert status == 400, (field, value, answer)
        assert (answer["error"]["param"] or field) == field
        said = answer["error"]["message"]
        assert "constrained-str" not in said and "list[" not in said  # terms of pydantic, not of the API
        assert field in said or "maximum context length" in said


async def test_extreme_but_valid_values_are_accepted(api: Api) -> None:
    extremes = {"repetition_penalty": 0.01, "min_tokens": 9, "logit_bias": {"5": -100, "6": 100}, "top_p": 1e-300}
    for temperature in (0, 1e-300, 2e-5, 1, 100):
        for more in ({}, extremes, {**extremes, "repetition_penalty": 100, "min_p": 1, "top_k": 10**30}):
            body = {"temperature": temperature, "max_tokens": 10, "stop_token_ids": [6], **more}
            assert isinstance(await api.complete("hello", **body), str)


async def test_min_tokens_is_refused_if_every_token_ends_the_answer(api: Api) -> None:
    for temperature in (0, 1):
        body = {"prompt": "x", "stop_token_ids": list(range(api.server._base.vocab_size)), "temperature": temperature}
        assert (await api.post(COMPLETIONS, **body))[0] == 200
        status, answer = await api.post(COMPLETIONS, **body, min_tokens=2)
        assert status == 400 and answer["error"]["param"] == "min_tokens"


UNSUPPORTED = [  # path, field, a value that changes the answer, a value that does not
    (COMPLETIONS, "prompt_logprobs", 2, None),
    (COMPLETIONS, "skip_special_tokens", False, True),
    (COMPLETIONS, "truncate_prompt_tokens", 5, None),
    (COMPLETIONS, "guided_choice", ["a", "b"], None),
    (COMPLETIONS, "bad_words", ["a"], []),
    (COMPLETIONS, "include_stop_str_in_output", True, False),
    (COMPLETIONS, "add_special_tokens", False, True),
    (CHAT, "add_special_tokens", True, False),
    (CHAT, "chat_template", "{{ messages }}", None),
    (CHAT, "echo", True, False),
    (CHAT, "documents", [{"text": "x"}], []),
    (CHAT, "modalities", ["text", "audio"], ["text"]),
    (CHAT, "functions", [{"name": "f"}], []),
    (COMPLETIONS, "tools", [{"type": "function"}], []),
]


async def test_an_unsupported_field_is_refused_by_name_if_it_changes_the_answer(api: Api) -> None:
    for path, field, value, neutral in UNSUPPORTED:
        body = {"prompt": "x", "max_tokens": 2} if path == COMPLETIONS else {"messages": HI, "max_tokens": 2}
        status, answer = await api.post(path, **body, **{field: value})
        assert (status, answer["error"]["param"]) == (400, field)
        assert answer["error"]["message"] == f"{field}: this engine does not support it"
        assert (await api.post(path, **body, **{field: neutral}))[0] == 200
        assert (await api.post(path, **body, user="u", store=True, metadata={"a": 1}, whatever=[{}]))[0] == 200


async def test_headers_may_contain_any_bytes(base: Path) -> None:
    async with running(base, api_keys=("secret",)) as api:
        strange = b"\xff\xfe".decode(errors="surrogateescape")
        async with api.client.get("/v1/models", headers={"Authorization": f"Bearer {strange}"}) as response:
            assert response.status == 401
        headers = {"Authorization": "Bearer secret", "X-Request-Id": strange}
        for stream in (False, True):
            body = {"prompt": "x", "max_tokens": 2, "stream": stream}
            async with api.client.post(COMPLETIONS, json=body, headers=headers) as response:
                assert response.status == 200 and "cmpl-" in await response.text()
        async with api.client.post(
            COMPLETIONS, json={"prompt": "x"}, headers={**headers, "X-Request-Id": "order-7"}
        ) as response:
            assert (await response.json())["id"] == "cmpl-order-7"
        headers["Content-Encoding"] = "gzip"
        async with api.client.post(COMPLETIONS, data=b"no gzip", headers=headers) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (415, 415)


async def test_a_body_that_is_too_large_is_refused(api: Api) -> None:
    status, answer = await send(api, b'{"prompt": "' + b"x" * (17 << 20) + b'"}')
    assert (status, answer["error"]["code"]) == (413, 413)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(api: Api, path: str) -> None:
    """Megabytes of text would block the tokenizer for all other callers."""
    text, read = "x" * (15 << 20), []
    encode = api.server._base.tokenizer.encode
    api.server._base.tokenizer.encode = lambda text, **more: (read.append(len(text)), encode(text, **more))[1]
    body = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    status, answer = await api.post(path, **body)
    assert status == 400 and read == []
    assert "maximum context length is 256 tokens, which hold at most 1280 characters" in answer["error"]["message"]
    assert len(await api.complete("x" * 250, max_tokens=2, ignore_eos=True)) == 2


async def test_requests_beyond_the_queue_limit_are_refused(base: Path) -> None:
    async with running(base, max_num_seqs=2, max_waiting_requests=3) as api:
        gate, tokenize = threading.Event(), api.server._generator._tokenize

        def held_up(request: Any) -> Any:
            assert gate.wait(20)
            return tokenize(request)

        api.server._generator._tokenize = held_up  # type: ignore[method-assign]
        body = {"prompt": "x", "max_tokens": 2}
        accepted = [asyncio.create_task(api.post(COMPLETIONS, **body)) for _ in range(5)]
        await api.until(lambda: api.server._generator._arriving == 5)
        async with api.client.post(COMPLETIONS, json=body) as response:
            assert response.status == 503 and response.headers["Retry-After"]
        gate.set()
        assert [status for status, _ in await asyncio.gather(*accepted)] == [200] * 5


async def test_every_token_can_have_a_bias(api: Api) -> None:
    biases = {str(token): -1.0 for token in range(2, api.server._base.vocab_size)}
    assert await api.complete("hello", logit_bias=biases) == await api.complete("hello", logit_bias={"0": 1, "1": 1})


async def test_an_invalid_path_is_reported_as_not_found(api: Api) -> None:
    for path in ("x" * 5000, "/etc/passwd", "/nul\0", "relative"):
        status, answer = await api.load("x", path)
        assert (status, answer["error"]["type"]) == (404, "NotFoundError"), answer


async def test_an_adapter_that_is_read_for_a_disconnected_caller_is_not_kept(base: Path, tmp_path: Path) -> None:
    async with running(base, max_loras=1, max_cpu_loras=1) as api:
        for name in ("a", "b"):
            assert (await api.load(name, make_adapter(base, tmp_path / name, seed=1)))[0] == 200
        await api.until(lambda: api.engine.residency.names() == ["b"])
        asked, gate = api.hold_up_reads()
        request = asyncio.create_task(api.complete("hello", "a"))
        await asyncio.to_thread(asked.wait, 10)
        request.cancel()
        await api.until(lambda: api.engine.activity().waiting == 0)
        gate.set()
        await api.until(lambda: not api.engine._loading)
        assert api.engine.residency.names() == ["b"]
        assert await api.complete("hello", "a") == await api.complete("hello", "b")


async def test_an_engine_whose_thread_has_ended_is_unhealthy(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause is a bug or a lack of memory. The kubelet restarts the engine. Until then, no request waits."""
    api.slow_down()
    request = asyncio.create_task(api.post(COMPLETIONS, prompt="hello", max_tokens=200, ignore_eos=True))
    await api.until(lambda: api.engine.activity().running == 1)

    def fails(engine: Engine) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_trim", fails)
        patch.setattr(threading, "excepthook", lambda _: None)
        started = time.monotonic()
        assert (await request)[0] == 503
        assert time.monotonic() - started < 5
    assert (await api.get("/health"))[0] == 503
    assert (await api.post(COMPLETIONS, model=BASE, prompt="x"))[0] == 503
    assert (await api.load("x", "/nowhere"))[0] in (404, 503)


def start(monkeypatch: pytest.MonkeyPatch, model: str) -> Any:
    """Run the program until it exits. Return its exit code or its message."""
    monkeypatch.setattr(sys, "argv", ["engine", "--model", model])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit:
            program.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return exit.value.code


def test_a_model_that_cannot_be_served_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert start(monkeypatch, "/nowhere") == "the model at /nowhere cannot be served: there is no config.json"
    (tmp_path / "config.json").write_text("{}")
    said = start(monkeypatch, str(tmp_path))
    assert said.startswith(f"the model at {tmp_path} cannot be served: ") and "model_type" in said


def test_sigterm_while_the_model_loads_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is the first process of its container. Such a process ignores signals without a handler."""

    def reads_long(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(program, "load_base_model", reads_long)
    started = time.monotonic()
    assert start(monkeypatch, "/model") == 0
    assert time.monotonic() - started < 10
