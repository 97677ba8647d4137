"""Requests to a sequence of adapters, as a client sees them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web
from graft.contracts.gateway import Backend, RouteEntry, Routes, RouteTarget
from worlds.engine import BASE, expected, make_adapter, make_base, running
from worlds.gateway import World, events, refused, sse, world
from worlds.serving import FakeEngine, eventually

MODEL = "team-a/pipeline"
FIRST, SECOND = "team-a--translate-1.0.0--0123456789ab", "team-a--shorten-2.0.0--ba9876543210"
STEPS = [
    RouteTarget(engine_model=FIRST, adapter="translate-1.0.0", version="1.0.0"),
    RouteTarget(engine_model=SECOND, adapter="shorten-2.0.0", version="2.0.0"),
]
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


def table(made: World, *loaded: list[str], steps: list[RouteTarget] = STEPS) -> Routes:
    """Return a route table with the sequence. `loaded` gives the loaded adapters of each engine."""
    return Routes(
        namespace="team-a",
        deployment="dep",
        base_model="base",
        routes=[RouteEntry(model=MODEL, targets=[], steps=steps)],
        backends=[
            Backend(pod=f"pod-{index}", address=address, loaded=["base", *names])
            for index, (address, names) in enumerate(zip(made.addresses, loaded, strict=bool(loaded)))
        ],
    )


async def echo(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Answer with the question followed by the mark of the adapter. Stream the answer if the request says so."""
    mark = "A" if body["model"] == FIRST else "B"
    if "messages" in body:
        text = body["messages"][-1]["content"] + mark
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    else:
        text = body["prompt"] + mark
        choice = {"text": text, "finish_reason": "stop"}
    if not body.get("stream"):
        return web.json_response({"id": "c", "model": body["model"], "choices": [choice], "usage": USAGE})
    async with sse(request) as response:
        for event in ({"choices": [{"delta": {"content": text}}]}, {"choices": [], "usage": USAGE}):
            await response.write(b"data: " + web.json_response(event).body + b"\n\n")  # type: ignore[operator]
        await response.write(b"data: [DONE]\n\n")
    return response


def ask(made: World, **more: Any) -> Any:
    return made.post({"model": MODEL, "messages": [{"role": "user", "content": "q"}], **more}, CHAT)


async def test_each_step_gets_the_answer_of_the_step_before() -> None:
    async with world() as made:
        made.engines[0].answer = echo
        made.update(table(made, [FIRST, SECOND]))
        sent = {"temperature": 0.5, "seed": 3, "max_tokens": 9, "n": 2, "stop": ["x"], "tools": [TOOL]}
        async with ask(made, **sent) as response:
            answer = await response.json()
            assert response.status == 200 and response.headers["X-Graft-Adapter"] == "shorten-2.0.0"
        assert answer["choices"][0]["message"]["content"] == "qAB" and answer["model"] == MODEL
        assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 14, "total_tokens": 24}
        assert answer["graft"] == {
            "adapter": "shorten-2.0.0",
            "version": "2.0.0",
            "deployment": "dep",
            "namespace": "team-a",
            "steps": [
                {"adapter": "translate-1.0.0", "version": "1.0.0", "finish_reason": "stop"},
                {"adapter": "shorten-2.0.0", "version": "2.0.0"},
            ],
        }
        first, second = made.engines[0].requests
        assert first == {
            "model": FIRST, "messages": [{"role": "user", "content": "q"}], "temperature": 0.5, "seed": 3, "max_tokens": 9
        }  # fmt: skip
        assert second == {**sent, "model": SECOND, "messages": [{"role": "user", "content": "qA"}]}


async def test_only_the_last_step_streams_and_each_answer_is_the_next_prompt() -> None:
    async with world(step_tokens=33) as made:
        made.engines[0].answer = echo
        made.update(table(made, [FIRST, SECOND]))
        body = {"model": MODEL, "prompt": "q", "stream": True, "stream_options": {"include_usage": True}}
        async with made.post(body, "/v1/completions") as response:
            opening, usage, done = events(await response.read())
        assert opening["choices"][0]["delta"]["content"] == "qAB" and opening["model"] == MODEL and done == "[DONE]"
        assert [step["adapter"] for step in opening["graft"]["steps"]] == ["translate-1.0.0", "shorten-2.0.0"]
        assert usage["usage"]["total_tokens"] == 24 and "graft" not in usage
        first, second = made.engines[0].requests
        assert first == {"model": FIRST, "prompt": "q", "max_tokens": 33}
        assert second["prompt"] == "qA" and second["stream"] is True


async def test_the_steps_may_be_in_different_replicas() -> None:
    async with world(engines=2) as made:
        for engine in made.engines:
            engine.answer = echo
        made.update(table(made, [SECOND], [FIRST]))
        async with ask(made) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "qAB"
        assert [len(engine.requests) for engine in made.engines] == [1, 1]


async def test_a_sequence_is_available_only_if_every_step_is() -> None:
    async with world() as made:
        made.update(table(made, [FIRST]))
        async with ask(made) as response:
            error = await refused(response, 503, "model_unavailable")
            assert "shorten-2.0.0" in error["message"] and "translate" not in error["message"]
            assert response.headers["Retry-After"]
        async with made.session.get(f"{made.url}/v1/models/{MODEL}") as response:
            card = (await response.json())["graft"]
        assert card["state"] == "unavailable" and [step["version"] for step in card["steps"]] == ["1.0.0", "2.0.0"]
        assert made.engines[0].requests == []


async def test_a_failure_names_its_step() -> None:
    async def fails(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] == SECOND:
            return FakeEngine().error(400, f"{SECOND}: too long", param="messages")
        return await echo(request, body)

    async with world() as made:
        made.engines[0].answer = fails
        made.update(table(made, [FIRST, SECOND]))
        async with ask(made) as response:
            error = await refused(response, 400, "400")
        assert error["message"] == f"step 2 of 2 (shorten-2.0.0): {MODEL}: too long" and error["param"] == "messages"


async def test_an_empty_answer_is_not_passed_to_the_next_step() -> None:
    async def silent(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"choices": [{"message": {"content": " "}}], "usage": USAGE})

    async with world() as made:
        made.engines[0].answer = silent
        made.update(table(made, [FIRST, SECOND]))
        async with ask(made) as response:
            error = await refused(response, 502, "upstream_error")
        assert error["message"].startswith("step 1 of 2 (translate-1.0.0) returned an empty answer")
        async with made.post({"model": MODEL, "prompt": ["a", "b"]}, "/v1/completions") as response:
            assert (await refused(response, 400, "invalid_request"))["param"] == "prompt"


async def test_a_client_that_disconnects_cancels_the_running_step() -> None:
    begun: list[str] = []

    async def hangs(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        begun.append(body["model"])
        await asyncio.Event().wait()
        raise AssertionError

    async with world() as made:
        made.engines[0].answer = hangs
        made.update(table(made, [FIRST, SECOND]))
        asking = asyncio.create_task(ask(made).__aenter__())
        await eventually(lambda: begun)
        asking.cancel()
        await eventually(lambda: made.engines[0].cancelled == 1)
        await asyncio.gather(asking, return_exceptions=True)
        assert begun == [FIRST]
        await eventually(lambda: made.gateway.in_flight == 0)


async def test_a_later_step_uses_the_version_that_is_routed_when_it_begins() -> None:
    newer = RouteTarget(engine_model="team-a--shorten-2.1.0--ffffffffffff", adapter="shorten-2.1.0", version="2.1.0")
    async with world() as made:

        async def shifts(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if body["model"] == FIRST:
                made.update(table(made, [FIRST, newer.engine_model], steps=[STEPS[0], newer]))
            return await echo(request, body)

        made.engines[0].answer = shifts
        made.update(table(made, [FIRST, SECOND]))
        async with ask(made) as response:
            answer = await response.json()
        assert [step["version"] for step in answer["graft"]["steps"]] == ["1.0.0", "2.1.0"]


async def test_a_request_to_a_sleeping_sequence_waits_until_every_step_is_loaded() -> None:
    async with world() as made:
        for name in (FIRST, SECOND):
            made.engines[0].adapters[name] = f"/adapters/{name}"
        made.engines[0].answer = echo
        asleep = {"idle_seconds": 60, "unavailable": "it is asleep; a request wakes it"}
        made.update(table(made).model_copy(update=asleep))
        waiting = asyncio.create_task(ask(made).__aenter__())
        held = f'graft_gateway_held{{model="{MODEL}"}} '
        await eventually(lambda: made.metric(held + "1.0"))
        made.update(table(made, [FIRST]).model_copy(update=asleep))
        assert await made.metric(held + "1.0") and not waiting.done()
        made.update(table(made, [FIRST, SECOND]).model_copy(update=asleep))
        response = await waiting
        assert (await response.json())["choices"][0]["message"]["content"] == "qAB"
        response.close()


async def test_a_sequence_of_two_real_adapters_is_answered_correctly(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first, second = (make_adapter(base, tmp_path / name, seed) for seed, name in ((1, "first"), (2, "second")))
    between = expected(base, first, "hello", 12)
    async with running(base, max_lora_rank=8) as api, world(engines=0) as made:
        await api.load(FIRST, first)
        await api.load(SECOND, second)
        made.addresses.append(f"{api.client.host}:{api.client.port}")
        part = table(made, [FIRST, SECOND])
        made.update(part.model_copy(update={"base_model": BASE}))
        body = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 12}
        async with made.post(body, "/v1/completions") as response:
            answer = await response.json()
        assert answer["choices"][0]["text"] == expected(base, second, between, 12)
        assert answer["usage"]["completion_tokens"] == 24
        async with made.post({**body, "stream": True}, "/v1/completions") as response:
            found = events(await response.read())
        streamed = "".join(choice["text"] for item in found[:-1] for choice in item["choices"])
        assert streamed == answer["choices"][0]["text"] and found[-1] == "[DONE]"
