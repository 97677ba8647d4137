"""How much mixing adapters in one batch costs, and what it saves: one run, interleaved, medians.

    python benchmarks/serve/engine_mix.py [--model DIR] [--runs 7] [--rows 16] [--tokens 48] [--rank 8]

Three ways to answer the same requests on one base model, measured in turns:
  one        every request names the same adapter
  mixed      every request names another adapter, all in one batch
  switching  every request names another adapter, one request after the other
`mixed_over_one` is throughput against throughput, as clients see it over HTTP: 1 would mean that mixing is free.
`mixed_over_switching` is what a batch saves over serving adapter after adapter. `step_one_over_mixed` compares seconds
per bare step of the model, without reading prompts and picking tokens; 1 again means free. The result is printed and
written to build/bench/engine_mix.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

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
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/tiny-llama/model"
OUT = ROOT / "build/bench/engine_mix.json"
PROMPT = list(range(20, 44))  # token ids


def make_adapters(model: Path, to: Path, count: int, rank: int) -> list[Path]:
    """Adapters of random weights on every linear layer."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    paths = [to / f"adapter-{index}" for index in range(count)]
    for index, path in enumerate(paths):
        torch.manual_seed(index)
        for name, weight in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        network.save_pretrained(path)
    return paths


async def answer(session: aiohttp.ClientSession, model: str, tokens: int) -> int:
    """One request. Returns the tokens of its answer."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        return int((await response.json())["usage"]["completion_tokens"])


async def throughput(session: aiohttp.ClientSession, models: list[str], tokens: int, together: bool) -> float:
    """Tokens per second over one request per model name."""
    started = time.perf_counter()
    if together:
        counts = await asyncio.gather(*(answer(session, model, tokens) for model in models))
    else:
        counts = [await answer(session, model, tokens) for model in models]
    return sum(counts) / (time.perf_counter() - started)


def step_seconds(network: Network, weights: list[LoraWeights], rows: int, steps: int) -> float:
    """Seconds per bare step in which row i has the adapter i modulo their number."""
    sequences = []
    for index in range(rows):
        adapter = index % len(weights)
        context = network.begin()
        network.read(context, PROMPT, weights[adapter])
        network.share(context)
        sequences.append((context, Row(f"bench{adapter}", weights[adapter])))
    batch = [Step(context, 50, row) for context, row in sequences]
    network.step(batch, repeatable=False)  # the rows' matrices are copied once
    started = time.perf_counter()
    for _ in range(steps):
        network.step(batch, repeatable=False)
    return (time.perf_counter() - started) / steps


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=cpu_limit())
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)

    count = flags.rows
    settings = Settings(
        str(flags.model), ("base",), max_loras=count, max_cpu_loras=count, max_lora_rank=64, max_num_seqs=count
    )
    server = Server(settings, load_base_model(settings))
    seen: dict[str, list[float]] = {key: [] for key in ("one", "mixed", "switching", "step_one", "step_mixed")}
    try:
        async with TestServer(server.application()) as front, aiohttp.ClientSession(front.make_url("/")) as session:
            with tempfile.TemporaryDirectory() as folder:
                paths = make_adapters(flags.model, Path(folder), count, flags.rank)
                for path in paths:
                    await server.registry.load(LoadLoraRequest(lora_name=path.name, lora_path=str(path)))
            names = [path.name for path in paths]
            weights = [server.engine.residency.use(server.registry.entries[name].adapter) for name in names]
            await throughput(session, names, 4, together=True)  # warm
            for run in range(flags.runs):
                ways = [("one", names[:1] * count, True), ("mixed", names, True), ("switching", names, False)]
                for key, models, together in ways if run % 2 else reversed(ways):
                    seen[key].append(await throughput(session, models, flags.tokens, together))
                steps = [("step_one", weights[:1]), ("step_mixed", weights)]
                for key, chosen in steps if run % 2 else reversed(steps):
                    task = partial(step_seconds, server.engine.network, chosen, count, flags.tokens)
                    seen[key].append(await asyncio.wrap_future(server.engine.call(task)))
    finally:
        await server.close()

    middle = {key: statistics.median(values) for key, values in seen.items()}
    result = {
        "mixed_over_one": middle["mixed"] / middle["one"],
        "mixed_over_switching": middle["mixed"] / middle["switching"],
        "step_one_over_mixed": middle["step_one"] / middle["step_mixed"],
        "tokens_per_second": {key: middle[key] for key in ("one", "mixed", "switching")},
        "step_milliseconds": {key: 1000 * middle[key] for key in ("step_one", "step_mixed")},
        "goals": {"mixed_over_one": 0.8, "mixed_over_switching": 4.0},
        "settings": {**vars(flags), "model": flags.model.name},
        "runs": seen,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
