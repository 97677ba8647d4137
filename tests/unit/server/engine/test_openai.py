"""OpenAI's fields in an answer: log-probabilities, echo, penalties, limits and usage.

The tests also cover evicted adapters and the time limits of the engine.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_server.engine.settings import parse
from worlds.engine import BASE, Api, load_network, make_adapter, make_seq2seq, running


async def choice(api: Api, **body: Any) -> Any:
    ask = {"prompt": "hello", "temperature": 0, "max_tokens": 12, "ignore_eos": True, **body}
    status, answer = await api.post("/v1/completions", **ask)
    assert status == 200, answer
    return answer["choices"][0]


def plain_logprobs(base: Path, ids: list[int]) -> Any:
    """Return the log-probabilities [tokens - 1, vocab] of the plain model for each token after the first."""
    with torch.inference_mode():
        return load_network(base)(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)


async def test_a_completion_returns_the_logprobs_of_the_model(api: Api, base: Path) -> None:
    found = await choice(api, logprobs=2, max_tokens=3)
    report, encode = found["logprobs"], api.server._base.encode
    assert "".join(report["tokens"]) == found["text"]
    assert report["text_offset"] == [0, 1, 2]
    wanted = plain_logprobs(base, encode("hello" + found["text"]))[4:]
    chosen = wanted[range(3), encode(found["text"])]
    assert report["token_logprobs"] == pytest.approx(chosen.tolist(), abs=1e-4)
    for step, top in enumerate(report["top_logprobs"]):
        assert list(top.values())[-1] == pytest.approx(float(wanted[step].max()), abs=1e-4)
        assert len(top) == 2 and report["tokens"][step] in top
    assert (await choice(api))["logprobs"] is None
    assert [len(top) for top in (await choice(api, logprobs=0, max_tokens=3))["logprobs"]["top_logprobs"]] == [1] * 3


async def test_logprobs_do_not_change_with_temperature_or_penalties(api: Api) -> None:
    first = (await choice(api, logprobs=1))["logprobs"]["top_logprobs"][0]
    changed = await choice(api, logprobs=1, temperature=3.0, seed=1, logit_bias={"9": 5.0})
    assert max(changed["logprobs"]["top_logprobs"][0].values()) == pytest.approx(max(first.values()), abs=1e-5)


async def test_a_chat_returns_the_same_logprobs_whole_and_streamed(api: Api) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    _, answer = await api.post("/v1/chat/completions", **ask, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    text = answer["choices"][0]["message"]["content"]
    assert "".join(entry["token"] for entry in content) == text and len(content) == 8
    for entry in content:
        assert entry["bytes"] == list(entry["token"].encode())
        best = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(best) == 3 and best == sorted(best, reverse=True) and entry["logprob"] == best[0]
    chunks = await api.stream("/v1/chat/completions", **ask, logprobs=True, top_logprobs=3)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


async def test_echo_returns_the_logprobs_of_the_prompt(
    api: Api, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation tools use echo. The prompt is longer than a chunk, so its log-probabilities span several chunks."""
    monkeypatch.setattr("graft_server.engine.generation.PREFILL_CHUNK", 4)
    prompt = "hello there"
    found = await choice(api, prompt=prompt, echo=True, logprobs=1, max_tokens=2)
    report, ids = found["logprobs"], api.server._base.encode(found["text"])
    assert found["text"].startswith(prompt) and "".join(report["tokens"]) == found["text"]
    wanted = plain_logprobs(base, ids)[range(len(ids) - 1), ids[1:]]
    assert report["token_logprobs"][0] is None and report["top_logprobs"][0] is None
    assert report["token_logprobs"][1:] == pytest.approx(wanted.tolist(), abs=1e-4)

    events = await api.stream(
        "/v1/completions", prompt=prompt, echo=True, logprobs=1, max_tokens=2, temperature=0, ignore_eos=True
    )
    assert "".join(event["choices"][0]["text"] for event in events) == found["text"]
    offsets = [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == report["text_offset"]
    assert (await choice(api, prompt=ids[:5], echo=True, max_tokens=1))["text"].startswith("hello")
    async with running(make_seq2seq(tmp_path / "t5")) as other:
        status, answer = await other.post("/v1/completions", prompt="x", echo=True, logprobs=1)
        assert status == 400 and answer["error"]["param"] == "echo"


async def test_penalties_biases_and_minimum_length_change_the_answer(api: Api) -> None:
    encode = api.server._base.encode
    plain = (await choice(api, max_tokens=40))["text"]
    assert len(set(plain)) < len(plain)
    for penalty in ({"frequency_penalty": 2, "presence_penalty": 2}, {"repetition_penalty": 50.0}):
        assert len(set((await choice(api, max_tokens=40, **penalty))["text"])) > len(set(plain))
    assert "q" not in plain
    assert set((await choice(api, logit_bias={str(encode("q")[0]): 100}))["text"]) == {"q"}

    stop = encode(plain[3])[0]
    short = await choice(api, max_tokens=40, stop_token_ids=[stop])
    assert short == {"index": 0, "text": plain[: plain.index(plain[3])], "logprobs": None, "finish_reason": "stop"}
    held = await choice(api, max_tokens=40, stop_token_ids=[stop], min_tokens=20)
    assert len(held["text"]) >= 20 and plain[3] not in held["text"][:20]


async def test_min_p_keeps_only_likely_tokens(api: Api) -> None:
    texts = {(await choice(api, temperature=2.0, seed=seed, min_p=1.0))["text"] for seed in range(4)}
    assert texts == {(await choice(api))["text"]}
    assert len({(await choice(api, temperature=2.0, seed=seed))["text"] for seed in range(4)}) == 4


async def test_a_stream_of_several_answers_ends_with_the_usage(api: Api) -> None:
    ask = {"prompt": ["hello", "x"], "n": 2, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    *events, last = await api.stream("/v1/completions", **ask, stream_options={"include_usage": True})
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26} and not last["choices"]
    texts = [""] * 4
    for event in events:
        assert event["usage"] is None
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    _, whole = await api.post("/v1/completions", **ask)
    assert texts == [one["text"] for one in whole["choices"]]


async def test_each_chunk_of_a_stream_has_the_usage_until_then_if_it_is_asked_for(api: Api) -> None:
    ask = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = await api.stream("/v1/completions", **ask, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in [*events, last]] == [1, 2, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in [*events, last]} == {5}


async def test_other_requests_continue_while_an_evicted_adapter_is_read_again(base: Path, tmp_path: Path) -> None:
    """The disk is slow. Only the request for the evicted adapter waits for it. Finally, all requests are answered."""
    async with running(base, max_loras=2, max_cpu_loras=2) as api:
        for index in range(3):
            assert (await api.load(f"a{index}", make_adapter(base, tmp_path / f"a{index}", seed=index)))[0] == 200
        await api.until(lambda: api.engine.residency.names() == ["a1", "a2"])  # a0 was used least recently
        asked, gate = api.hold_up_reads()
        first = asyncio.create_task(api.complete("hello", "a0"))
        await asyncio.to_thread(asked.wait, 10)
        assert await api.complete("hello", "a1") and await api.complete("hello", BASE)
        assert not first.done()
        gate.set()
        assert await first
        await api.until(lambda: api.engine.residency.names() == ["a1", "a0"])  # a2 was used least recently


async def test_an_adapter_with_running_requests_is_never_evicted(base: Path, tmp_path: Path) -> None:
    async with running(base, max_loras=1, max_cpu_loras=1) as api:
        path = make_adapter(base, tmp_path / "a", seed=1)
        await api.load("a", path)
        wanted = await api.complete("hello", "a", max_tokens=60, ignore_eos=True)
        api.slow_down(0.005)
        answer = asyncio.create_task(api.complete("hello", "a", max_tokens=60, ignore_eos=True))
        await api.until(lambda: api.engine.activity().running == 1)
        for index in range(3):
            await api.load(f"b{index}", shutil.copytree(path, tmp_path / f"b{index}"))
            assert "a" in api.engine.residency.names()
        assert await answer == wanted


async def test_waiting_too_long_gives_503_and_running_too_long_gives_504(base: Path) -> None:
    async with running(base, max_num_seqs=1, queue_timeout=0.2, request_timeout=1.0) as api:
        api.slow_down(0.02)
        first = asyncio.create_task(api.post("/v1/completions", prompt="x", max_tokens=200, ignore_eos=True))
        await api.until(lambda: api.engine.activity().running == 1)
        async with api.client.post("/v1/completions", json={"prompt": "x"}) as response:
            assert response.status == 503 and response.headers["Retry-After"]
            assert "waited too long" in (await response.json())["error"]["message"]
        status, answer = await first
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (504, "TimeoutError", 504)
        assert api.engine.activity().running == 0
        events = await api.stream("/v1/completions", prompt="x", max_tokens=200, ignore_eos=True)
        assert events[-1]["error"]["code"] == 504 and len(events) > 3
    settings = parse(["--model", "m", "--queue-timeout", "3", "--request-timeout", "9.5"], {})
    assert (settings.queue_timeout, settings.request_timeout) == (3, 9.5)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--queue-timeout", "0"], {})


async def test_stream_options_may_be_null(api: Api) -> None:
    ask = {"messages": [{"role": "developer", "content": "hi"}, {"role": "user", "content": "hi"}], "max_tokens": 2}
    for options in (None, {}, {"include_usage": None}, {"include_usage": False}):
        chunks = await api.stream("/v1/chat/completions", **ask, stream_options=options)
        assert all(chunk["usage"] is None for chunk in chunks)
