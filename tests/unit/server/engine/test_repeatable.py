"""A seeded request gets the same answer, to the last bit of its log-probabilities, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_server.engine.adapters import Limits, LoraWeights, read_adapter
from graft_server.engine.lora import Row
from graft_server.engine.model import load_base_model
from graft_server.engine.network import Network, Step
from graft_server.engine.settings import Settings
from testbed.shell import REPOSITORY
from worlds.engine import BASE, Api, make_adapter, make_base, make_prompt, make_seq2seq, running

EXAMPLE = REPOSITORY / "examples/tiny-llama/model"
SEEDED = {"prompt": "hello", "seed": 5, "temperature": 1.2, "top_p": 0.95, "max_tokens": 24, "logprobs": 3}


async def ask(api: Api, **body: Any) -> Any:
    status, answer = await api.post("/v1/completions", **body)
    assert status == 200, answer
    return answer["choices"][0]


async def in_company(api: Api, models: list[str], rounds: int) -> None:
    """Repeat one seeded request per model while other requests start and end. Every answer must equal the first one."""
    alone = {model: await ask(api, model=model, **SEEDED) for model in models}
    assert len({choice["text"] for choice in alone.values()}) == len(models)
    chance = random.Random(3)

    async def neighbour() -> None:
        await asyncio.sleep(chance.random() * 0.2)
        body = {
            "model": chance.choice(models),
            "prompt": "x" * chance.randint(1, 60),
            "max_tokens": chance.randint(1, 40),
            "temperature": chance.choice([0, 1.0]),
            "ignore_eos": True,
        }
        await ask(api, **body)

    for _ in range(rounds):
        others = [asyncio.create_task(neighbour()) for _ in range(chance.randint(1, 20))]
        await asyncio.sleep(chance.random() * 0.1)
        order = chance.sample(models, len(models))
        again = await asyncio.gather(*(ask(api, model=model, **SEEDED) for model in order))
        assert dict(zip(order, again, strict=True)) == alone
        await asyncio.gather(*others)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_answer_of_a_causal_model_does_not_depend_on_other_requests(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base")
    adapters = {
        "a": make_adapter(base, tmp_path / "a", seed=1),
        "b": make_adapter(base, tmp_path / "b", seed=2, target_modules="all-linear", r=16),
        "prompt": make_prompt(base, tmp_path / "p", seed=3),
    }
    async with running(base, max_num_seqs=20, dtype=dtype) as api:
        assert api.engine.network.by_rows
        for name, path in adapters.items():
            assert (await api.load(name, path))[0] == 200
        await in_company(api, [BASE, *adapters], rounds=6)


async def test_the_answer_of_an_encoder_decoder_does_not_depend_on_other_requests(tmp_path: Path) -> None:
    base = make_seq2seq(tmp_path / "base")
    async with running(base, max_num_seqs=20) as api:
        await api.load("a", make_adapter(base, tmp_path / "a", seed=1, target_modules=["q", "v", "wo"]))
        await in_company(api, [BASE, "a"], rounds=4)


@pytest.mark.parametrize(("threads", "owners", "companies"), [(1, (0, 1, 3), 3), (2, (3,), 1)])
def test_a_rows_logits_do_not_change_by_one_bit(
    tmp_path: Path, threads: int, owners: tuple[int, ...], companies: int
) -> None:
    """The matrices of the example model are so large that the rounding of a product depends on the number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = load_base_model(Settings(str(EXAMPLE), ("m",)))
        network = Network(base)
        limits = Limits(base.modules, base.hidden_size, 64, 512)
        paths = [make_adapter(EXAMPLE, tmp_path / f"a{r}", r, r=r, target_modules="all-linear") for r in (4, 8, 24)]
        weights = [None, *(read_adapter(str(path), limits) for path in paths)]

        def begin(owner: int, length: int) -> Step:
            own = weights[owner]
            context = network.begin()
            network.read(context, list(range(30, 30 + length)), own)
            network.share(context)
            return Step(context, 50, Row(f"a{owner}", own) if isinstance(own, LoraWeights) else None)

        def answer(step: Step, company: list[Step], index: int) -> Any:
            """Return the logits of two steps of one row. The row is at `index` among the rows of `company`."""
            rows = [*company[:index], step, *company[index:]]
            return torch.stack([network.step(rows, repeatable=True)[index] for _ in range(2)])

        chance = random.Random(1)
        for owner in owners:
            alone = answer(begin(owner, 9), [], 0)
            for _ in range(companies):
                company = [begin(chance.randrange(4), chance.randint(1, 40)) for _ in range(chance.choice([3, 15, 18]))]
                assert answer(begin(owner, 9), company, chance.randint(0, len(company))).equal(alone)
    finally:
        torch.set_num_threads(before)
