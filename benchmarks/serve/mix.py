"""Measure the cost and the benefit of mixing adapters in one batch.

Three ways to answer the same requests on one base model are measured in turns:
  one        every request names the same adapter, all in one batch
  mixed      every request names another adapter, all in one batch
  switching  every request names another adapter, one request after the other
Throughput is measured at the client, over HTTP. The seconds of a bare step of the model are measured too. Such a step
does not read prompts or choose tokens, so it shows the cost of the mixed low-rank updates alone.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp.test_utils import TestServer
from graft.cpus import cpu_limit
from graft_server.engine.app import Server
from graft_server.engine.lora import LoraWeights, Row
from graft_server.engine.model import load_base_model
from graft_server.engine.network import Network, Step
from graft_server.engine.protocol import LoadLoraRequest
from graft_server.engine.settings import Settings

from benchmarks.serve.adapters import TINY, make_adapters
from benchmarks.train.results import ratio, show, spread, verdict, write

LEAST_OVER_ONE, LEAST_OVER_SWITCHING = 0.8, 4.0
ADAPTERS, RANK, TOKENS = 16, 8, 48
PROMPT = list(range(20, 44))  # token ids


async def answer(session: aiohttp.ClientSession, model: str, tokens: int) -> int:
    """Send one request. Return the number of tokens of its answer."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        return int((await response.json())["usage"]["completion_tokens"])


async def throughput(session: aiohttp.ClientSession, models: list[str], tokens: int, together: bool) -> float:
    """Send one request to each model in `models`. Return the tokens per second over all of them."""
    started = time.perf_counter()
    if together:
        counts = await asyncio.gather(*(answer(session, model, tokens) for model in models))
    else:
        counts = [await answer(session, model, tokens) for model in models]
    return sum(counts) / (time.perf_counter() - started)


def step_seconds(network: Network, weights: list[LoraWeights], rows: int, steps: int) -> float:
    """Return the seconds per bare step. Row i has the adapter i modulo the number of adapters."""
    sequences = []
    for index in range(rows):
        adapter = index % len(weights)
        context = network.begin()
        network.read(context, PROMPT, weights[adapter])
        network.share(context)
        sequences.append((context, Row(f"bench{adapter}", weights[adapter])))
    batch = [Step(context, 50, row) for context, row in sequences]
    network.step(batch, repeatable=False)  # not measured: the first step copies the rows' matrices
    started = time.perf_counter()
    for _ in range(steps):
        network.step(batch, repeatable=False)
    return (time.perf_counter() - started) / steps


async def run(rounds: int) -> dict[str, list[float]]:
    """Measure each way in turn, `rounds` times."""
    settings = Settings(
        str(TINY), ("base",), max_loras=ADAPTERS, max_cpu_loras=ADAPTERS, max_lora_rank=64, max_num_seqs=ADAPTERS
    )
    server = Server(settings, load_base_model(settings))
    seen: dict[str, list[float]] = {key: [] for key in ("one", "mixed", "switching", "step_one", "step_mixed")}
    try:
        async with TestServer(server.application()) as front, aiohttp.ClientSession(front.make_url("/")) as session:
            with tempfile.TemporaryDirectory() as folder:
                paths = make_adapters(TINY, Path(folder), ADAPTERS, RANK)
                for path in paths:
                    await server.registry.load(LoadLoraRequest(lora_name=path.name, lora_path=str(path)))
            names = [path.name for path in paths]
            weights: list[Any] = [server.engine.residency.use(server.registry.entries[name].adapter) for name in names]
            await throughput(session, names, 4, together=True)  # warm up
            for number in range(rounds):
                ways = [("one", names[:1] * ADAPTERS, True), ("mixed", names, True), ("switching", names, False)]
                for key, models, together in ways if number % 2 else reversed(ways):
                    seen[key].append(await throughput(session, models, TOKENS, together))
                steps = [("step_one", weights[:1]), ("step_mixed", weights)]
                for key, chosen in steps if number % 2 else reversed(steps):
                    task = partial(step_seconds, server.engine.network, chosen, ADAPTERS, TOKENS)
                    seen[key].append(await asyncio.wrap_future(server.engine.call(task)))
                over_one = seen["mixed"][-1] / seen["one"][-1]
                print(f"  round {number + 1}/{rounds}: mixed / one {over_one:.3f}", flush=True)
    finally:
        await server.close()
    return seen


def measure(rounds: int) -> dict[str, Any]:
    """Measure all ways, `rounds` times. Return the results."""
    torch.set_num_threads(cpu_limit())
    seen = asyncio.run(run(rounds))
    over_one, over_switching = ratio(seen["mixed"], seen["one"]), ratio(seen["mixed"], seen["switching"])
    result = {
        "adapters": ADAPTERS,
        "rank": RANK,
        "tokensPerSecond": {key: seen[key] for key in ("one", "mixed", "switching")},
        "stepSeconds": {"one": seen["step_one"], "mixed": seen["step_mixed"]},
        "mixedOverOne": over_one,
        "mixedOverSwitching": over_switching,
        "stepOneOverMixed": ratio(seen["step_one"], seen["step_mixed"]),
        "met": over_one >= LEAST_OVER_ONE and over_switching >= LEAST_OVER_SWITCHING,
    }
    write("serve-mix", result)
    show(
        f"{ADAPTERS} requests in one batch ({rounds} rounds)",
        [
            ("one adapter, tokens/s", spread(seen["one"])),
            (f"{ADAPTERS} adapters mixed, tokens/s", spread(seen["mixed"])),
            (f"{ADAPTERS} adapters one after the other, tokens/s", spread(seen["switching"])),
            ("mixed / one", verdict(over_one, LEAST_OVER_ONE, least=True)),
            ("mixed / one after the other", verdict(over_switching, LEAST_OVER_SWITCHING, least=True)),
            ("bare step, one / mixed", f"{result['stepOneOverMixed']:.3f}"),
        ],
    )
    return result
