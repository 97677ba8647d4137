"""The answers of the engine: every caller gets the answer of its own adapter, also beside other requests."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from transformers import GPT2Config, Qwen2Config
from worlds.engine import BASE, Api, expected, make_adapter, make_base, make_network, running

PROMPTS = ["hello", "a much longer prompt, so that rows are padded", "x", "What is the capital of France?"]


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """Save adapters that tune different modules. Their names contain dots and dashes."""
    kinds: dict[str, dict[str, Any]] = {
        "shop--support-1.0.0--0123456789ab": {},
        "shop--support-1.0.1--0123456789ac": {"target_modules": ["q_proj", "gate_proj", "down_proj"], "r": 8},
        "bank--mail-2.0.0--ffffffffffff": {"target_modules": "all-linear", "use_rslora": True},
        "bank--embed-0.1.0--eeeeeeeeeeee": {
            "target_modules": ["embed_tokens", "v_proj", "lm_head"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    }
    return {
        name: make_adapter(base, base.parent / name, seed=seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), start=10)
    }


async def load_all(api: Api, adapters: dict[str, Path]) -> None:
    answers = await asyncio.gather(*(api.load(name, path) for name, path in adapters.items()))
    assert [status for status, _ in answers] == [200] * len(adapters), answers


async def test_every_caller_gets_its_own_adapters_answer(api: Api, base: Path, adapters: dict[str, Path]) -> None:
    await load_all(api, adapters)
    models = {BASE: None, **adapters}
    cases = [(name, prompt) for prompt in PROMPTS for name in models]
    answers = await asyncio.gather(*(api.complete(prompt, name) for name, prompt in cases))
    wanted = [expected(base, models[name], prompt, 24) for name, prompt in cases]
    assert answers == wanted
    assert len(set(wanted)) == len(cases)  # otherwise the comparison proves nothing


@pytest.mark.parametrize("window", [None, 16])
async def test_answers_stay_correct_while_rows_join_and_leave_the_batch(tmp_path: Path, window: int | None) -> None:
    """The answers have different lengths and start at different times, with and without a sliding window."""
    base = make_base(tmp_path / "base")
    if window:
        layers = ["sliding_attention", "full_attention"]
        make_network(base, Qwen2Config, sliding_window=window, use_sliding_window=True, layer_types=layers)
    adapter = make_adapter(base, tmp_path / "adapter", seed=3)
    async with running(base) as api:
        await api.load("a", adapter)
        api.slow_down(0.003)

        async def ask(index: int) -> tuple[str, str]:
            await asyncio.sleep(0.02 * index)
            prompt, tokens, path = PROMPTS[index % 4], 5 + 7 * (index % 6), (None, adapter)[index % 2]
            answer = await api.complete(prompt, "a" if path else BASE, max_tokens=tokens)
            return answer, expected(base, path, prompt, tokens)

        for answer, wanted in await asyncio.gather(*(ask(index) for index in range(12))):
            assert answer == wanted


async def test_gpt2_and_its_adapter_are_served_correctly(tmp_path: Path) -> None:
    """GPT-2 has learned positions, Conv1D layers and tied embeddings."""
    base = make_base(tmp_path / "base")
    make_network(base, GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    adapter = make_adapter(base, tmp_path / "adapter", seed=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    async with running(base) as api:
        assert (await api.load("a", adapter))[0] == 200
        cases = [(prompt, path) for prompt in PROMPTS for path in (None, adapter)]
        answers = await asyncio.gather(*(api.complete(prompt, "a" if path else BASE) for prompt, path in cases))
        assert answers == [expected(base, path, prompt, 24) for prompt, path in cases]


async def test_a_prompt_longer_than_a_chunk_is_answered_correctly(
    api: Api, base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft_server.engine.generation.PREFILL_CHUNK", 16)
    prompt = "once upon a time " * 6
    short, long = await asyncio.gather(api.complete("x"), api.complete(prompt))
    assert (short, long) == (expected(base, None, "x", 24), expected(base, None, prompt, 24))


async def test_chat_uses_the_template_and_streams_the_same_answer(
    api: Api, base: Path, adapters: dict[str, Path]
) -> None:
    await load_all(api, adapters)
    name, path = next(iter(adapters.items()))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    body = {"model": name, "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    status, answer = await api.post("/v1/chat/completions", **body)
    assert status == 200
    wanted = expected(base, path, "<system>Be brief.\n<user>hi\n<assistant>", 20)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted}
    assert answer["object"] == "chat.completion" and answer["model"] == name and answer["id"].startswith("chatcmpl-")
    counts = answer["usage"]
    assert counts["prompt_tokens"] == len("<system>Be brief.\n<user>hi\n<assistant>")
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]

    *chunks, last = await api.stream("/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["choices"] == [] and last["usage"] == counts
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(chunks) > 5

    events = await api.stream("/v1/completions", model=name, prompt="hi", temperature=0, max_tokens=20)
    assert "".join(event["choices"][0]["text"] for event in events) == await api.complete("hi", name, max_tokens=20)


async def test_stop_strings_end_the_answer_and_are_not_in_it(api: Api) -> None:
    whole = await api.complete("hello", ignore_eos=True, max_tokens=40)
    stop = whole[10:13]
    cut = whole[: whole.index(stop)]
    for given in (stop, ["never there!", stop]):
        _, answer = await api.post(
            "/v1/completions", prompt="hello", temperature=0, max_tokens=40, stop=given, ignore_eos=True
        )
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (cut, "stop")
        assert answer["usage"]["completion_tokens"] < 40
    events = await api.stream(
        "/v1/completions", prompt="hello", temperature=0, max_tokens=40, stop=stop, ignore_eos=True
    )
    assert "".join(event["choices"][0]["text"] for event in events) == cut


async def test_equal_seeds_give_equal_answers_whatever_shares_the_batch(api: Api, adapters: dict[str, Path]) -> None:
    await load_all(api, adapters)
    sampled = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 30, "ignore_eos": True}
    alone = await api.complete("hello", seed=5, **sampled)
    together = await asyncio.gather(
        *(api.complete("hello there", name, seed=9, **sampled) for name in adapters),
        api.complete("hello", seed=5, **sampled),
        api.complete("hello", seed=6, **sampled),
    )
    assert together[-2] == alone
    assert together[-1] != alone
    assert await api.complete("hello", **sampled) != await api.complete("hello", **sampled)


async def test_several_prompts_get_n_answers_each(api: Api) -> None:
    body = {"prompt": ["hello", "x"], "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    _, answer = await api.post("/v1/completions", **body)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 32, "total_tokens": 38}
    _, again = await api.post("/v1/completions", **body)
    assert [choice["text"] for choice in again["choices"]] == texts

    ids = api.server._base.encode("hello")
    _, by_ids = await api.post("/v1/completions", prompt=ids, temperature=0, max_tokens=8)
    assert by_ids["choices"][0]["text"] == await api.complete("hello", max_tokens=8)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [5, 100000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 100}, "prompt"),
        ({"stream": "perhaps"}, "stream"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"prompt": "x" * 256}, "maximum context length"),
        ({"max_tokens": 256}, "maximum context length"),
    ],
)
async def test_bad_completion_requests_name_the_field(api: Api, body: dict[str, Any], says: str) -> None:
    status, answer = await api.post("/v1/completions", **{"prompt": "x", **body})
    assert status == 400 and answer["error"]["code"] == 400
    assert says in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs: it needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "maximum context length"),
    ],
)
async def test_bad_chat_requests_name_the_field(api: Api, body: dict[str, Any], says: str) -> None:
    status, answer = await api.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "x"}], **body})
    assert status == 400 and says in answer["error"]["message"]


async def test_a_body_that_is_not_a_request_is_refused(api: Api) -> None:
    for payload in ("{oops", "[" * 100_000, '{"prompt": "\\ud800"}', "null"):
        headers = {"Content-Type": "application/json"}
        async with api.client.post("/v1/completions", data=payload, headers=headers) as response:
            assert response.status == 400 and (await response.json())["error"]["type"] == "Bad Request"
    assert (await api.get("/nowhere"))[0] == 404
    assert (await api.get("/v1/completions"))[0] == 405


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_disconnects_frees_its_slot(api: Api, stream: bool) -> None:
    api.slow_down()
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": stream}
    request = asyncio.create_task(api.client.post("/v1/completions", json=body))
    await api.until(lambda: api.engine.activity().running == 1)
    if stream:
        response = await request
        await response.content.readline()
        response.close()
    else:
        request.cancel()
    await api.until(lambda: api.engine.activity().running == 0, seconds=2)
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in (await api.get("/metrics"))[1]


async def test_a_full_queue_gives_503_with_retry_after(base: Path) -> None:
    async with running(base, max_num_seqs=1, max_waiting_requests=2) as api:
        api.slow_down()
        ask = {"ignore_eos": True, "max_tokens": 20}
        accepted = [asyncio.create_task(api.complete("hello", **ask)) for _ in range(3)]
        await api.until(lambda: (api.engine.activity().running, api.engine.activity().waiting) == (1, 2))
        async with api.client.post("/v1/completions", json={"prompt": "x"}) as response:
            assert response.status == 503 and response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["type"] == "ServiceUnavailableError"
        assert len(set(await asyncio.gather(*accepted))) == 1
        status, _ = await api.post("/v1/completions", prompt="x", n=4)
        assert status == 400  # the request could never run


async def test_unload_lets_running_answers_finish_and_then_frees_the_memory(
    api: Api, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    name, source = next(iter(adapters.items()))
    path = Path(shutil.copytree(source, tmp_path / "copy"))
    await api.load(name, path)
    resident = next(iter(api.engine.residency._resident.values()))
    weights = [weakref.ref(matrix) for pair in resident.pairs.values() for matrix in (pair.a, pair.b)]
    assert len(weights) == 8
    del resident
    plain = await api.complete("hello", max_tokens=60)

    api.slow_down(0.01)
    ask = {"prompt": "hello", "model": name, "max_tokens": 60}
    answers = [asyncio.create_task(api.complete(**ask)) for _ in range(10)]  # two more than can run at once
    base_answer = asyncio.create_task(api.complete("hello", max_tokens=60))
    await api.until(lambda: api.engine.activity().running == 8)
    assert (await api.unload(name))[0] == 200
    shutil.rmtree(path)
    status, body = await api.post("/v1/completions", **ask)
    assert (status, body["error"]["type"], body["error"]["param"]) == (404, "NotFoundError", "model")
    assert name in api.engine.activity().resident_adapters

    assert set(await asyncio.gather(*answers)) == {expected(base, source, "hello", 60)}
    assert await base_answer == plain
    await api.until(lambda: not api.engine.residency.names())
    gc.collect()
    assert [ref for ref in weights if ref() is not None] == []
    assert not api.engine.network.hooks._rows.matrices


async def test_loads_and_unloads_do_not_change_running_answers(api: Api, base: Path, adapters: dict[str, Path]) -> None:
    (first, path), *others = adapters.items()
    await api.load(first, path)
    api.slow_down(0.005)
    answers = [
        asyncio.create_task(api.complete(prompt, model, max_tokens=60)) for prompt in PROMPTS for model in (first, BASE)
    ]
    while not all(answer.done() for answer in answers):
        for name, other in others:
            assert (await api.load(name, other))[0] == 200
        for name, _ in others:
            assert (await api.unload(name))[0] == 200
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in (path, None)]
    wanted = [expected(base, adapter, prompt, 60) for prompt, adapter in cases]
    assert [answer.result() for answer in answers] == wanted


async def test_adapters_that_do_not_all_fit_in_memory_are_still_served(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    copies = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in adapters.items()}
    async with running(base, max_loras=1, max_cpu_loras=2) as api:
        await load_all(api, copies)
        await api.until(lambda: len(api.engine.residency.names()) == 2)
        answers = await asyncio.gather(*(api.complete("hello", name) for name in copies), api.complete("hello"))
        wanted = [expected(base, path, "hello", 24) for path in (*copies.values(), None)]
        assert answers == wanted
        await api.until(lambda: len(api.engine.residency.names()) == 2)

        evicted = next(name for name in copies if name not in api.engine.residency.names())
        shutil.rmtree(copies[evicted])
        status, body = await api.post("/v1/completions", model=evicted, prompt="hello")
        assert status == 500 and evicted in body["error"]["message"]
        assert (await api.get("/health"))[0] == 200


async def test_max_loras_limits_the_adapters_of_a_batch_without_starvation(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft_server.engine.generation.MAX_ADAPTER_WAIT", 0.1)
    first, second = list(adapters)[:2]
    async with running(base, max_loras=1, max_cpu_loras=4, max_num_seqs=2) as api:
        await load_all(api, adapters)
        api.slow_down(0.005)
        ask = {"ignore_eos": True, "max_tokens": 30}
        finished: list[str] = []

        async def keep_asking(times: int) -> None:
            for _ in range(times):
                await api.complete("hello", first, **ask)
                finished.append(first)

        crowd = [asyncio.create_task(keep_asking(5)) for _ in range(3)]
        await api.until(lambda: api.engine.activity().running == 2)
        await api.complete("hello", second, **ask)
        assert len(finished) < 15
        await asyncio.gather(*crowd)


async def test_a_failed_step_fails_its_requests_and_not_the_server(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await api.complete("hello")
    with monkeypatch.context() as patch:
        patch.setattr(api.engine.network, "_forward", lambda *arguments, **more: 1 / 0)
        status, body = await api.post("/v1/completions", prompt="hello")
        assert (status, body["error"]["type"]) == (500, "InternalServerError")
    assert await api.complete("hello") == before


async def test_draining_finishes_running_requests_and_refuses_new_ones(api: Api) -> None:
    api.slow_down()
    running_answer = asyncio.create_task(api.complete("hello", ignore_eos=True))
    await api.until(lambda: api.engine.activity().running == 1)
    drained = asyncio.create_task(api.server.drain(10))
    await asyncio.sleep(0)
    assert (await api.get("/health"))[0] == 503
    assert (await api.post("/v1/completions", prompt="x"))[0] == 503
    assert await running_answer
    assert await drained


async def test_on_sigterm_the_process_finishes_running_requests_and_exits(base: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "graft_server.engine",
        "--model",
        str(base),
        "--served-model-name",
        BASE,
        "--port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
    assert process.stderr
    port = None
    while line := (await process.stderr.readline()).decode():
        if match := re.search(r"on 127\.0\.0\.1:(\d+)$", line.strip()):
            port = match[1]
            break
    assert port
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
        async with session.post("/v1/completions", json=body) as response:
            await response.content.readline()
            process.send_signal(signal.SIGTERM)
            assert (await response.text()).endswith("data: [DONE]\n\n")
    started = time.monotonic()
    await process.stderr.read()
    assert await process.wait() == 0
    assert time.monotonic() - started < 10
