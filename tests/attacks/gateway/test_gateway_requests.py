"""Clients of the gateway that send what costs much, or what an engine must not get."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from typing import Any

import pytest
from aiohttp import web
from graft_server.gateway import bodies
from worlds.attackers import LongestPause, Slowed, body_of, guarded, raw, request
from worlds.gateway import ENGINE_MODEL, MODEL, World, refused, world
from worlds.serving import eventually

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x", "identity, gzip"])
async def test_compressed_bodies(encoding: str) -> None:
    """Send 15 KB that unpack to 10 MB of brackets -> 415, and nothing is unpacked."""
    bomb = gzip.compress(b'{"model": "a/b", "prompt": ' + b"[" * (10 << 20))
    async with world() as made:
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        async with made.session.post(made.url + CHAT, data=bomb, headers=headers) as response:
            await refused(response, 415, "unsupported_encoding")
        assert not made.engines[0].requests


FLOODS = {
    "nested": b'{"model": "a/b", "messages": ' + b"[" * (3 << 20),
    "objects": b'{"model": "a/b", "messages": [' + b'{"a":{}},' * (300_000) + b"{}]}",
    "empty lists": b'{"model": "a/b", "messages": [' + b"[]," * (1 << 20) + b"[]]}",
    "numbers": b'{"model": "a/b", "prompt": [' + b"1," * (1_500_000) + b"1]}",
    "keys": b'{"model": "a/b"' + b"".join(b',"%d":1' % at for at in range(300_000)) + b"}",
    "quotes": b'"' + b'\\"' * (1_500_000),
    "empty strings": b'""' * (1_500_000),
    "closing": b"]" * (3 << 20),
    "digits": b'{"model": "a/b", "n": ' + b"1" * (3 << 20) + b"}",
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_bodies_of_many_values(flood: str) -> None:
    """Send 3 MB of JSON that becomes hundreds of MB of objects, twice at once -> 400; loop and memory stay free."""
    async with world() as made:
        tracemalloc.start()
        try:
            async with LongestPause() as pause:
                statuses = await asyncio.gather(*(_status(made, FLOODS[flood]) for _ in range(2)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert 400 in statuses and set(statuses) <= {400, 429}  # the second may have to wait for the first
        assert peak < 60 << 20  # the client's own copies are in it
        assert pause.seconds < 1.0
        assert made.gateway.bytes.used("everybody") == 0 and not made.engines[0].requests


async def _status(made: World, body: bytes) -> int:
    async with made.post(body) as response:
        await response.read()
        return int(response.status)


async def test_a_caller_that_holds_many_bytes() -> None:
    """Keep large requests running -> 429 with Retry-After for this caller, and others are answered."""
    async with world(max_bytes_per_caller=1_000_000, max_bytes_in_flight=10_000_000) as made:
        go = asyncio.Event()

        async def slow(request: web.Request, body: Any) -> web.StreamResponse:
            if len(body["prompt"]) > 1000:
                await go.wait()
            return web.json_response({"model": ENGINE_MODEL, "choices": []})

        made.engines[0].answer = slow
        large = {"model": MODEL, "prompt": "x" * 400_000}
        held = [asyncio.create_task(made.post(large, COMPLETIONS).__aenter__()) for _ in range(2)]
        await eventually(lambda: len(made.engines[0].requests) == 2)
        async with made.post(large, COMPLETIONS) as response:
            error = await refused(response, 429, "too_many_bytes_in_flight")
            assert response.headers["Retry-After"] and "at most 1000000" in error["message"]
        headers = {"Authorization": "Bearer another"}
        async with made.session.post(
            made.url + COMPLETIONS, json={"model": MODEL, "prompt": "x"}, headers=headers
        ) as r:
            assert r.status == 200
        go.set()
        for task in held:
            (await task).close()
        await eventually(lambda: made.gateway.bytes.used("everybody") == 0)


async def test_a_caller_that_disconnects_while_its_body_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a large body and disconnect, again and again -> what the thread holds counts, and one is parsed at a time."""
    slow = Slowed(bodies.parsed)
    monkeypatch.setattr(bodies, "parsed", slow)
    async with world() as made, guarded(made.gateway.application()) as (host, port, connections):
        try:
            body = body_of('"user": "' + "x" * 1_000_000 + '"')
            async with raw(host, port) as [one]:
                one.send(request(body))
                await eventually(lambda: slow.calls == 1)
            await eventually(lambda: not connections.open)
            async with raw(host, port, 2) as opened:  # wait for the first, and never begin
                for one in opened:
                    one.send(request(body))
                await eventually(lambda: made.gateway.bytes.used("everybody") > 3_000_000)
            await eventually(lambda: not connections.open and made.gateway.bytes.used("everybody") < 2_000_000)
            await asyncio.sleep(0.1)
            assert made.gateway.bytes.used("everybody") > 1_000_000 and slow.calls == 1
        finally:
            slow.go.set()
        await eventually(lambda: made.gateway.bytes.used("everybody") == 0)
        assert slow.calls == 1 and not made.engines[0].requests


async def test_a_caller_that_invents_keys() -> None:
    """Send a new key with every large request -> its address is bounded, too: 429; all together: 503."""
    for limits, status in (({"max_bytes_per_peer": 1_000_000}, 429), ({"max_bytes_in_flight": 1_000_000}, 503)):
        async with world(**limits) as made:
            go = asyncio.Event()

            async def slow(request: web.Request, body: Any, go: asyncio.Event = go) -> web.StreamResponse:
                await go.wait()
                return web.json_response({"model": ENGINE_MODEL, "choices": []})

            made.engines[0].answer = slow
            body = {"model": MODEL, "prompt": "x" * 300_000}

            async def ask(at: int, made: World = made, body: Any = body) -> tuple[int, bool]:
                headers = {"Authorization": f"Bearer {at}"}
                async with made.session.post(made.url + COMPLETIONS, json=body, headers=headers) as response:
                    await response.read()
                    return response.status, "Retry-After" in response.headers

            asked = [asyncio.create_task(ask(at)) for at in range(6)]
            await eventually(lambda asked=asked: sum(task.done() for task in asked) == 3)
            assert {task.result() for task in asked if task.done()} == {(status, True)}
            go.set()
            assert [status for status, _ in await asyncio.gather(*asked)].count(200) == 3


ENGINES_OWN = [
    ("chat_template", "{% for i in range(10**9) %}{% endfor %}"),
    ("priority", -100),
    ("lora_request", {"lora_name": "x", "lora_path": "/models/other"}),
    ("lora_path", "/models/other"),
    ("kv_transfer_params", {"do_remote_prefill": True, "remote_host": "10.0.0.1"}),
    ("ec_transfer_params", {"a": "b"}),
    ("vllm_xargs", {"a": 1}),
    ("extra_args", {"a": 1}),
    ("mm_processor_kwargs", {"num_crops": 10**6}),
    ("media_io_kwargs", {"video": {"num_frames": 10**6}}),
    ("prompt_embeds", "AAAA"),
    ("logits_processors", ["os.system"]),
    ("request_id", "another's"),
    ("guided_decoding_backend", "outlines"),
    ("repetition_detection", {"a": 1}),
    ("use_beam_search", True),
    ("whatever", 1),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
    ("chat_template_kwargs", {"tokenize": True}),
    ("chat_template_kwargs", {"messages": 1}),
    ("chat_template_kwargs", {"__class__": 1}),
    ("chat_template_kwargs", {"a": {"b": 1}}),
    ("chat_template_kwargs", {"a": [1]}),
    ("chat_template_kwargs", {"a": "x" * 5000}),
    ("chat_template_kwargs", {f"a{at}": at for at in range(100)}),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
    ),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "http://10.0.0.1/"}]}]),
    ("messages", [{"role": "user", "content": [{"image_url": "http://10.0.0.1/"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}]),
    ("messages", [{"role": "user", "content": ["http://10.0.0.1/"]}]),
    ("messages", HI * 5000),
    ("n", 17),
    ("n", 0),
    ("n", 10**30),
    ("n", True),
    ("n", "2"),
    ("n", 1.5),
    ("logprobs", 5),
    ("top_logprobs", 21),
    ("top_logprobs", -1),
    ("prompt_logprobs", -1),
    ("max_tokens", -1),
    ("max_tokens", 10**4000),
    ("max_completion_tokens", "all"),
    ("min_tokens", 10**20),
    ("temperature", "hot"),
    ("temperature", -1),
    ("temperature", 10**400),
    ("top_p", 2),
    ("top_k", 2**40),
    ("seed", 2**64),
    ("stop", ["x"] * 65),
    ("stop", "x" * 5000),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [1] * 2000),
    ("stop_token_ids", [-1]),
    ("bad_words", ["x"] * 100),
    ("logit_bias", {str(at): 1 for at in range(2000)}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 1000}),
    ("logit_bias", [1]),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 100_000}}}),
    ("response_format", {"type": "structural_tag", "structures": []}),
    ("response_format", "json"),
    ("structured_outputs", {"regex": "(a+)+" * 2000}),
    ("structured_outputs", {"grammar": "x" * 100_000}),
    ("structured_outputs", {"choice": ["x"] * 1000}),
    ("structured_outputs", {"_backend": "x"}),
    ("guided_json", {"a": ["x"] * 50_000}),
    ("guided_regex", 1),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 200),
    ("tools", [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}]),
    ("tools", [{}]),
    ("tools", {"a": 1}),
    ("tool_choice", {"type": "function", "function": {"name": 1}}),
    ("tool_choice", {"a": "x" * 2000}),
    ("stream", "yes"),
    ("stream_options", {"include_usage": "yes"}),
    ("stream_options", {"whatever": True}),
    ("stream_options", True),
    ("modalities", ["audio"]),
    ("documents", ["x"]),
    ("reasoning_effort", "x" * 1000),
]


async def test_fields_that_are_the_engines_own_or_out_of_bounds() -> None:
    """Send a field that names a path, a template, a priority or extra arguments, or is too large -> 400 names it."""
    async with world() as made:
        for name, value in ENGINES_OWN:
            async with made.post({"model": MODEL, "messages": HI, name: value}, CHAT) as response:
                error = await refused(response, 400, "invalid_request")
                assert error["param"] == name and name in error["message"], (name, value, error)
                assert len(error["message"]) < 400
        assert not made.engines[0].requests


async def test_what_sdks_send_is_answered() -> None:
    """Not an attack: fields of OpenAI's SDKs and vLLM's sampling are accepted, and arrive with their values."""
    passed = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "seed": 5, "stop": ["\n"], "max_completion_tokens": 50,
        "logprobs": True, "top_logprobs": 5, "logit_bias": {"50256": -100}, "frequency_penalty": 0.1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": False, "thinking_budget": 5}, "reasoning_effort": "low",
        "stream_options": {"include_usage": True}, "repetition_penalty": 1.1, "min_tokens": 1, "cache_salt": "s",
    }  # fmt: skip
    dropped = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "s", "verbosity": "low", "audio": None, "function_call": None, "chat_template": None,
    }  # fmt: skip
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": [
            {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r", "weight": 0},
    ]  # fmt: skip
    async with world() as made:
        async with made.post({"model": MODEL, "messages": messages, **passed, **dropped}, CHAT) as response:
            assert response.status == 200, await response.text()
        (seen,) = made.engines[0].requests
        arrived = seen.pop("messages")
        assert seen == {"model": ENGINE_MODEL, **passed}
        assert arrived[1]["content"] == [{"type": "text", "text": "t"}]
        assert "annotations" not in arrived[2] and arrived[2]["tool_calls"][0]["function"]["arguments"] == "{}"
        assert arrived[3]["weight"] == 0
        tokens = {"model": MODEL, "prompt": list(range(150_000)), "echo": True, "logprobs": 1, "best_of": 2}
        async with made.post(tokens, COMPLETIONS) as response:
            assert response.status == 200, await response.text()
        assert len(made.engines[0].requests[1]["prompt"]) == 150_000


MISTAKES = [
    body_of('"stop": "\\ud800"'),
    body_of('"stop": "\\udc00\\ud800"'),
    body_of('"\\ud800": 1'),
    body_of('"temperature": NaN'),
    body_of('"temperature": -Infinity'),
    body_of('"temperature": 1e999'),
    body_of('"max_tokens": ' + "1" * 5000),
    body_of('"seed": 1' + "0" * 4000),
    b'{"model": "\\ud800/x", "prompt": "x"}',
    b'{"model": {"a": 1}}',
    b'{"model": "' + MODEL.encode() + b'", "prompt": "\xff\xfe"}',
    b"\xff\xfe{\x00}\x00",
    b"",
    b"null",
    b"nul",
    b'{"model": "' + MODEL.encode() + b'", "messages": [[]]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": {"role": "user"}}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": {}, "content": "x"}]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": {"a": 1}}]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": [[]]}]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": [{"type": []}]}]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "assistant", "tool_calls": [1]}]}',
    b'{"model": "' + MODEL.encode() + b'", "messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}',
]


async def test_mistakes_of_clients() -> None:
    """Send half characters, NaN, huge numbers and wrong types -> 400 in OpenAI's shape, never a 5xx."""
    async with world() as made:
        for body in MISTAKES:
            for path in (CHAT, COMPLETIONS):
                async with made.post(body, path) as response:
                    error = await refused(response, 400, "invalid_request")
                    error["message"].encode()
        assert not made.engines[0].requests


HEADS = [
    b"X-Request-Id: \xff\xfe\xed\xa0\x80",
    b"X-Request-Id: " + b"x" * 5000,
    b"traceparent: \xed\xa0\x80",
    b"tracestate: " + b"x" * 5000,
    b"Authorization: Bearer \xff\xed\xa0\x80",
    b"Content-Type: \xff",
]


async def test_strange_headers_and_paths() -> None:
    """Send headers and paths of any bytes -> they never reach an engine, and no answer is a 5xx."""
    async with world() as made, guarded(made.gateway.application()) as (host, port, _):
        for head in HEADS:
            async with raw(host, port) as [one]:
                one.send(request(body_of('"seed": 1'), head))
                assert (await one.head()).split()[1] == b"200", head
        for headers in made.engines[0].headers:
            assert all(len(value) < 600 and value.isprintable() and value.isascii() for value in headers.values())
        for path in (b"/v1/models/%ed%a0%80", b"/v1/models/%ff", b"/v1/models/\xff\xfe", b"/v1/models/a/b%00", b"/%zz"):
            async with raw(host, port) as [one]:
                one.send(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await one.head()).split()[1] in (b"400", b"404"), path
        for broken in (
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"Content-Length: x\r\n\r\n",
            b"Content-Length: -1\r\n\r\n",
        ):
            async with raw(host, port) as [one]:
                one.send(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\n" + broken)
                assert (await one.head()).split()[1] == b"400", broken
