"""The HTTP interface of the gateway as its clients see it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from graft.contracts.gateway import ROUTES_KEY
from graft.prompttemplates import as_chat_template
from worlds.gateway import ENGINE_MODEL, GRAFT, MODEL, chunk, closed_port, events, refused, sse, table, world
from worlds.serving import FakeEngine, FakeKube, break_off, eventually, listening


async def test_an_answer_names_the_model_of_the_client() -> None:
    async with world() as made:
        async with made.post() as response:
            answer = await response.json()
            assert response.status == 200 and answer["model"] == MODEL and answer["graft"] == GRAFT
            assert response.headers["X-Graft-Adapter"] == "support-1.0.0"
            assert response.headers["X-Graft-Version"] == "1.0.0"
            request_id = response.headers["X-Request-Id"]
        assert made.engines[0].requests == [{"model": ENGINE_MODEL, "messages": []}]
        headers = made.engines[0].headers[0]
        assert "Authorization" not in headers and "TE" not in headers and headers["X-Request-Id"] == request_id
        async with made.post({"model": "team-a/plain", "prompt": "x"}, "/v1/completions") as response:
            answer = await response.json()
            assert answer["model"] == "team-a/plain" and answer["graft"]["adapter"] is None
            assert "X-Graft-Adapter" not in response.headers
        assert await made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="200"}} 1.0')


async def test_the_engine_gets_the_tokens_that_end_the_answers_of_a_version() -> None:
    async with world() as made:
        part = table(*made.addresses)
        part.routes[0].targets[0].stop_token_ids = [2, 7]
        made.update(part)
        for fields in ({}, {"stop_token_ids": [9, 7]}, {"ignore_eos": True}, {"model": "team-a/plain"}):
            async with made.post(**fields) as response:
                assert response.status == 200
        found = [request.get("stop_token_ids") for request in made.engines[0].requests]
        assert found == [[2, 7], [2, 7, 9], None, None]


async def test_the_engine_gets_the_template_of_the_versions_prompts_for_a_chat_only() -> None:
    async with world() as made:
        part = table(*made.addresses)
        part.routes[0].targets[0].prompt_template = "Q: {instruction}\nA: "
        made.update(part)
        asked = [{"role": "user", "content": "Hi"}]
        async with made.post(messages=asked) as response:
            assert response.status == 200
        async with made.post({"model": MODEL, "prompt": "Hi"}, "/v1/completions") as response:
            assert response.status == 200
        async with made.post(messages=asked, model="team-a/plain") as response:
            assert response.status == 200
        chat, completion, plain = made.engines[0].requests
        assert chat["chat_template"] == as_chat_template("Q: {instruction}\nA: ")
        assert chat["add_special_tokens"] is True
        assert "chat_template" not in completion and "chat_template" not in plain


async def test_a_stream_arrives_piece_by_piece() -> None:
    async with world() as made:
        more = asyncio.Event()

        async def answer(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                await response.write(chunk("a"))
                await more.wait()
                await response.write(chunk("b") + b"data: [DONE]\n\n")
            return response

        made.engines[0].answer = answer
        async with made.post(stream=True) as response:
            assert response.content_type == "text/event-stream" and response.headers["X-Graft-Version"] == "1.0.0"
            first = await asyncio.wait_for(response.content.readline(), 5)  # the engine has not finished its answer yet
            assert events(first)[0] == {"model": MODEL, "choices": [{"text": "a"}], "graft": GRAFT}
            more.set()
            rest = events(await response.read())
            assert rest == [{"model": MODEL, "choices": [{"text": "b"}]}, "[DONE]"]


async def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async with world(2) as made:

        async def answer(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                await response.write(chunk("a") + b'data: {"half')
                await asyncio.sleep(0.05)
                break_off(request)
            return response

        for engine in made.engines:
            engine.answer = answer
        async with made.post(stream=True) as response:
            assert response.status == 200
            first, last = events(await response.read())
        assert first["model"] == MODEL and last["error"]["code"] == "upstream_error"
        assert sum(len(engine.requests) for engine in made.engines) == 1  # no retry after the first byte
        assert await made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="broken"}} 1.0')


async def test_a_silent_engine_leads_to_a_timeout() -> None:
    async with world(2, idle_timeout=0.3) as made:

        async def silent(request: web.Request, body: Any) -> web.StreamResponse:
            if body.get("stream"):
                async with sse(request) as response:
                    await response.write(chunk("a"))
                    await asyncio.sleep(30)
            await asyncio.sleep(30)
            raise AssertionError

        for engine in made.engines:
            engine.answer = silent
        async with made.post() as response:
            await refused(response, 504, "timeout")
        async with made.post(stream=True) as response:
            first, last = events(await response.read())
        assert first["model"] == MODEL and last["error"]["code"] == "timeout"
        await eventually(lambda: sum(engine.cancelled for engine in made.engines) == 2)


@pytest.mark.parametrize("how", ["502", "503", "not_loaded", "disconnect", "broken"])
async def test_another_replica_takes_over_before_the_first_byte(how: str) -> None:
    async with world(2) as made:

        async def fail(request: web.Request, body: Any) -> web.StreamResponse:
            if how in ("502", "503"):
                return made.engines[0].error(int(how), "not now")
            if how == "not_loaded":
                return made.engines[0].error(
                    404, f"The model `{ENGINE_MODEL}` does not exist.", "NotFoundError", "model"
                )
            if how == "broken":
                async with sse(request) as response:
                    break_off(request)
                    return response
            break_off(request)
            raise ConnectionResetError

        made.engines[0].answer = fail
        for _ in range(8):
            async with made.post(stream=how == "broken") as response:
                assert response.status == 200, await response.text()
        assert made.engines[0].requests and len(made.engines[1].requests) == 8
        async with made.session.get(made.metrics_url) as response:
            assert f'graft_gateway_retries_total{{reason="{how}"}}' in await response.text()


async def test_an_unreachable_replica_is_avoided_for_a_while() -> None:
    async with world() as made:
        made.update(table(closed_port(), *made.addresses))
        for _ in range(20):
            async with made.post() as response:
                assert response.status == 200
        async with made.session.get(made.metrics_url) as response:
            text = await response.text()
        assert 'graft_gateway_retries_total{reason="connect"} 1.0' in text  # tried once, then avoided


async def test_the_least_busy_replica_gets_the_request() -> None:
    async with world(3) as made:
        go = asyncio.Event()

        async def slow(request: web.Request, body: Any) -> web.StreamResponse:
            await go.wait()
            return web.json_response({"model": ENGINE_MODEL})

        for engine in made.engines:
            engine.answer = slow

        async def ask() -> int:
            async with made.post() as response:
                await response.read()
                return int(response.status)

        asked = [asyncio.create_task(ask()) for _ in range(9)]
        await eventually(lambda: sum(len(engine.requests) for engine in made.engines) == 9)
        assert [len(engine.requests) for engine in made.engines] == [3, 3, 3]
        go.set()
        assert await asyncio.gather(*asked) == [200] * 9


async def test_a_request_that_cannot_be_answered_gets_a_clear_error() -> None:
    async with world(0, max_body_bytes=1000) as made:
        async with made.post() as response:
            await refused(response, 503, "model_unavailable")  # the gateway has no route table yet
        made.update(table(), table().model_copy(update={"namespace": "team-b", "routes": []}))
        async with made.post() as response:
            error = await refused(response, 503, "model_unavailable")
            assert "no ready replica" in error["message"] and response.headers["Retry-After"] == "5"
        made.update(table(unavailable="waiting for a GPU"))
        async with made.post() as response:
            assert "waiting for a GPU" in (await refused(response, 503, "model_unavailable"))["message"]
        address = closed_port()
        made.update(table(address))
        async with made.post() as response:
            message = (await refused(response, 503, "model_unavailable"))["message"]
            assert "cannot be reached" in message and address not in message
        async with made.post({"model": "team-b/secret"}) as response:
            error = await refused(response, 404, "model_not_found")
            assert error["param"] == "model" and "support" not in error["message"]
        for body in (b"{", b"[]", b'{"messages": []}', b'{"model": 7}', b'{"model": ""}', b"[" * 900):
            async with made.post(body) as response:
                await refused(response, 400, "invalid_request")
        async with made.post(b'{"model": "' + b"x" * 2000) as response:
            assert "1000 bytes" in (await refused(response, 413, "request_too_large"))["message"]

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 100

        async with made.session.post(made.url + "/v1/completions", data=endless()) as response:
            await refused(response, 413, "request_too_large")


async def test_refusals_of_the_engine_reach_the_client() -> None:
    async with world(2) as made:

        async def refuse(request: web.Request, body: Any) -> web.StreamResponse:
            return made.engines[0].error(400, f"max_tokens of {ENGINE_MODEL} is too large", param="max_tokens")

        for engine in made.engines:
            engine.answer = refuse
            engine.flat_errors = engine is made.engines[0]
        for _ in range(6):
            async with made.post(stream=True) as response:
                error = await refused(response, 400, "400")
                assert error["message"] == f"max_tokens of {MODEL} is too large" and error["param"] == "max_tokens"
        assert sum(len(engine.requests) for engine in made.engines) == 6  # a refusal is not retried on another replica


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_cancels_the_work_of_the_engine(stream: bool) -> None:
    async with world() as made:

        async def long(request: web.Request, body: Any) -> web.StreamResponse:
            if not body["stream"]:
                await asyncio.sleep(30)
            async with sse(request) as response:
                await response.write(chunk("a"))
                await asyncio.sleep(30)
            return response

        made.engines[0].answer = long
        asked = asyncio.create_task(made.post(stream=stream).__aenter__())
        await eventually(lambda: made.engines[0].requests)
        if stream:
            response = await asked
            await response.content.readline()
            response.close()
        else:
            asked.cancel()
        await eventually(lambda: made.engines[0].cancelled == 1)
        assert await eventually(
            lambda: made.metric(f'graft_gateway_requests_total{{model="{MODEL}",status="499"}} 1.0')
        )
        assert made.gateway.in_flight == 0


async def test_the_table_may_change_while_requests_run() -> None:
    async with world(2) as made:
        go = asyncio.Event()

        async def slow(request: web.Request, body: Any) -> web.StreamResponse:
            async with sse(request) as response:
                await response.write(chunk("a"))
                await go.wait()
                await response.write(b"data: [DONE]\n\n")
            return response

        made.engines[0].answer = slow
        made.update(table(made.addresses[0]))
        async with made.post(stream=True) as response:
            await response.content.readline()
            made.update(table(made.addresses[1]))
            async with made.post() as other:
                assert other.status == 200
            made.update()
            async with made.post() as other:
                await refused(other, 404, "model_not_found")
            go.set()
            assert events(await response.read())[-1] == "[DONE]"
        assert len(made.engines[1].requests) == 1


async def test_models_are_listed_with_their_state() -> None:
    async with world() as made:
        async with made.session.get(made.url + "/v1/models") as response:
            listing = await response.json()
        assert [card["id"] for card in listing["data"]] == ["team-a/plain", MODEL]
        assert listing["data"][1]["graft"] == {
            **GRAFT,
            "base_model": "base",
            "state": "available",
            "reason": None,
            "replicas": 1,
        }
        made.update(table(unavailable="scaled to zero"))
        async with made.session.get(made.url + f"/v1/models/{MODEL}") as response:
            card = await response.json()
            assert card["graft"]["state"] == "unavailable" and card["graft"]["reason"] == "scaled to zero"
        async with made.session.get(made.url + "/v1/models/team-a/none") as response:
            await refused(response, 404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/chat/completions/../../v1/load_lora_adapter"),
        ("POST", "/v1/chat/completions/%2e%2e/%2e%2e/load_lora_adapter"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1//load_lora_adapter"),
        ("GET", "/"),
    ],
)
async def test_other_paths_are_not_proxied(method: str, path: str) -> None:
    async with world() as made:
        host, _, port = made.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))  # a client library would normalize the path
        body = json.dumps({"model": MODEL, "lora_name": ENGINE_MODEL, "lora_path": "/x"})
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 404")
        assert not made.engines[0].calls and not made.engines[0].requests


async def test_health_and_readiness_follow_the_table_and_draining() -> None:
    async with world(0) as made:

        async def status(path: str) -> int:
            async with made.session.get(made.url + path) as response:
                return int(response.status)

        assert (await status("/healthz"), await status("/readyz")) == (200, 503)
        made.update()
        assert (await status("/healthz"), await status("/readyz")) == (200, 200)
        made.gateway.draining = True
        assert (await status("/healthz"), await status("/readyz")) == (200, 503)
        assert await made.metric("graft_gateway_table_age_seconds 2.5")


# The real processes


def kubeconfig(folder: Path, address: str) -> str:
    text = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://{address}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(text))
    return str(path)


async def start(module: str, environment: dict[str, str], *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdout=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )


async def test_on_sigterm_the_gateway_process_finishes_running_requests(tmp_path: Path) -> None:
    kube, engine, go = FakeKube(), FakeEngine(), asyncio.Event()

    async def slow(request: web.Request, body: Any) -> web.StreamResponse:
        async with sse(request) as response:
            await response.write(chunk("a"))
            await go.wait()
            await response.write(b"data: [DONE]\n\n")
        return response

    engine.answer = slow
    async with (
        listening(kube.app()) as api,
        listening(engine.app()) as address,
        aiohttp.ClientSession() as session,
    ):
        kube.put("routes-x", {ROUTES_KEY: table(address).json_text()}, {"graft.dev/component": "routes"})
        port = closed_port().rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        flags = ["--port", port, "--namespace", "graft", "--shutdown-delay", "0.2", "--drain-seconds", "20"]
        flags += ["--authentication", "none", "--metrics-port", closed_port().rpartition(":")[2]]
        process = await start("graft_server.gateway", {"KUBECONFIG": kubeconfig(tmp_path, api)}, *flags)
        try:

            async def ready() -> bool:
                try:
                    async with session.get(url + "/readyz") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(ready, seconds=30)
            async with session.post(url + "/v1/completions", json={"model": MODEL, "stream": True}) as response:
                await response.content.readline()
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(1)
                with pytest.raises(aiohttp.ClientError):
                    await session.get(url + "/healthz")  # the gateway accepts no new connections
                go.set()
                assert events(await response.read())[-1] == "[DONE]"
            assert await asyncio.wait_for(process.wait(), 10) == 0
            assert process.stdout is not None
            lines = [json.loads(line) for line in (await process.stdout.read()).splitlines()]
            assert {"time", "level", "logger", "message"} <= set(lines[0])
            assert any(line.get("model") == MODEL and line.get("status") == "200" for line in lines)
        finally:
            if process.returncode is None:
                process.kill()


async def test_the_agent_process_reports_its_state_and_exits_on_sigterm(tmp_path: Path) -> None:
    kube, engine = FakeKube(), FakeEngine()
    async with (
        listening(kube.app()) as api,
        listening(engine.app()) as address,
        aiohttp.ClientSession() as session,
    ):
        kube.put("dep-wanted", {"wanted.json": '{"baseModel": "base", "maxLoraRank": 8}'})
        kube.put("dep-residency", {})
        port = closed_port().rpartition(":")[2]
        environment = {
            "KUBECONFIG": kubeconfig(tmp_path, api),
            "POD_NAME": "pod-1",
            "POD_UID": "uid-1",
            "POD_NAMESPACE": "team-a",
        }
        flags = ["--wanted-configmap", "dep-wanted", "--residency-configmap", "dep-residency", "--port", port]
        flags += ["--engine-url", f"http://{address}", "--adapters-dir", str(tmp_path / "adapters")]
        process = await start("graft_server.agent", environment, *flags, "--base-model-name", "base")
        try:
            told = await eventually(lambda: kube.items["dep-residency"]["data"].get("pod-1"), seconds=30)
            await eventually(lambda: json.loads(kube.items["dep-residency"]["data"]["pod-1"])["ready"])
            assert json.loads(told)["podUid"] == "uid-1"
            async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                assert response.status == 200
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 5) == 0
        finally:
            if process.returncode is None:
                process.kill()
