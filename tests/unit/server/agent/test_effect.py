"""A loaded adapter is shown to work: with Graft's own engine, and in the pure comparison."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import torch
from graft.artifacts.effect import CANDIDATES, LENGTH, prompts
from graft.artifacts.manifest import Effect, EffectPrompt
from graft.contracts.agent import Wanted
from graft.contracts.mounts import CALLERS_FILE
from graft_server.agent.decisions.effect import check_effect
from graft_server.agent.decisions.reasons import AdapterError
from graft_server.agent.engine.access import Access
from graft_server.agent.storage.folders import EFFECT_FILE, UNCHECKED_FILE
from safetensors.torch import load_file, save_file
from worlds.agent import Pod
from worlds.agent import serving as agent_with_stand_in
from worlds.engine import BASE, make_adapter, make_base, make_prompt, make_seq2seq, recorded_effect, running


def scaled(adapter: Path, target: Path, factor: float) -> Path:
    """Copy an adapter, with the second matrices of its updates multiplied by a factor."""
    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()},
        target / "adapter_model.safetensors",
    )
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return target


def only_prompts(effect: Effect) -> Effect:
    """Return the record of an imported adapter: its answers are unknown."""
    return Effect(prompts=[EffectPrompt(prompt=prompt.prompt) for prompt in effect.prompts])


@asynccontextmanager
async def serving(base: Path, tmp_path: Path) -> AsyncIterator[tuple[Pod, aiohttp.ClientSession, str]]:
    async with running(base, max_lora_rank=8) as api, aiohttp.ClientSession() as session:
        pod, url = Pod(tmp_path / "adapters"), f"http://{api.client.host}:{api.client.port}"
        pod.wanted = Wanted(base_model=BASE, max_lora_rank=64, drain_seconds=0)
        await pod.start(session, url, base_model_name=BASE)
        try:
            yield pod, session, url
        finally:
            await pod.kill()


async def test_only_an_adapter_with_its_recorded_effect_is_loaded(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_adapter(base, tmp_path / "one", seed=1)
    two = make_adapter(base, tmp_path / "two", seed=2)
    nothing, twice = scaled(one, tmp_path / "nothing", 0.0), scaled(one, tmp_path / "twice", 2.0)
    tiny = scaled(one, tmp_path / "tiny", 1e-4)
    effect = recorded_effect(base, one)
    async with serving(base, tmp_path) as (pod, _, _):
        good = pod.publish(one, "good", 4, effect)
        half = pod.publish(one, "half", 4, recorded_effect(base, one, torch.bfloat16))
        large = pod.publish(
            one, "large", 4, only_prompts(effect).model_copy(update={"unmeasured": "the base is large"})
        )
        unknown = pod.publish(one, "unknown", 4)
        imported = pod.publish(one, "imported", 4, only_prompts(effect))
        untrained = pod.publish(nothing, "untrained", 4, recorded_effect(base, nothing))
        small = pod.publish(tiny, "small", 4, recorded_effect(base, tiny))
        silent = pod.publish(nothing, "silent", 4, effect)
        mute = pod.publish(nothing, "mute", 4, only_prompts(effect))
        other = pod.publish(two, "other", 4, effect)
        louder = pod.publish(twice, "louder", 4, effect)
        pod.want(good, half, large, unknown, imported, untrained, small, silent, mute, other, louder)
        for adapter in (good, half, imported):
            assert (await pod.state(adapter, "Loaded")).message is None
        assert "no record" in str((await pod.state(unknown, "Loaded")).message)
        assert str((await pod.state(large, "Loaded")).message).endswith("not measured: the base is large")
        for adapter in (untrained, small):
            assert "too little to measure" in str((await pod.state(adapter, "Loaded")).message)
        for adapter in (silent, mute):
            assert (await pod.state(adapter, "Failed")).reason == "LoadedWithoutEffect"
        for adapter in (other, louder):
            assert (await pod.state(adapter, "Failed")).reason == "LoadedWithOtherEffect"
        await pod.ready()  # a pod does not stay unready because of them
        # At no time was one of them reported as loaded, so no request was routed to it.
        bad = {adapter.engine_name for adapter in (silent, mute, other, louder)}
        assert not [
            item for told in pod.told for item in told.adapters if item.engine_name in bad and item.state == "Loaded"
        ]
        metrics = pod.agent.metrics.text().decode()
        for reason in ("LoadedWithoutEffect", "LoadedWithOtherEffect"):
            line = next(line for line in metrics.splitlines() if "failures_total" in line and reason in line)
            assert float(line.rpartition(" ")[2]) >= 2, line


async def test_an_engine_with_keys_answers_the_check(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_adapter(base, tmp_path / "one", seed=1)
    access = Access(tmp_path / "engine")
    callers = str(tmp_path / "engine" / CALLERS_FILE)
    async with running(base, max_lora_rank=8, callers=callers) as api, aiohttp.ClientSession() as session:
        pod = Pod(tmp_path / "adapters")
        pod.access = access
        pod.wanted = Wanted(base_model=BASE, max_lora_rank=64, drain_seconds=0)
        await pod.start(session, f"http://{api.client.host}:{api.client.port}", base_model_name=BASE)
        try:
            good = pod.publish(one, "good", 4, recorded_effect(base, one))
            pod.want(good)
            assert (await pod.state(good, "Loaded")).message is None
        finally:
            await pod.kill()


async def test_an_engine_that_cannot_answer_the_check_serves_the_adapter_with_a_message(tmp_path: Path) -> None:
    effect = Effect(prompts=[EffectPrompt(prompt=[1, 2])])
    async with agent_with_stand_in(tmp_path) as (pod, _, _):
        adapter = pod.store.publish("good", fields={"effect": effect})
        pod.want(adapter)
        found = await pod.state(adapter, "Loaded")
        assert "the engine refused the test prompts" in str(found.message)


async def test_tuned_prompts_and_seq2seq_models_are_checked_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = make_prompt(base, tmp_path / "one", seed=1), make_prompt(base, tmp_path / "two", seed=2)
    async with serving(base, tmp_path) as (pod, _, _):
        good = pod.publish(one, "good", None, recorded_effect(base, one))
        other = pod.publish(two, "other", None, recorded_effect(base, one))
        pod.want(good, other)
        assert (await pod.state(good, "Loaded")).message is None
        assert (await pod.state(other, "Failed")).reason == "LoadedWithOtherEffect"

    t5, folder = make_seq2seq(tmp_path / "t5"), tmp_path / "seq2seq"
    folder.mkdir()
    targets = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    adapter = make_adapter(t5, folder / "adapter", seed=1, **targets)
    another = make_adapter(t5, folder / "another", seed=2, **targets)
    async with serving(t5, folder) as (pod, _, _):
        good = pod.publish(adapter, "good", 4, recorded_effect(t5, adapter))
        other = pod.publish(another, "other", 4, recorded_effect(t5, adapter))
        pod.want(good, other)
        assert (await pod.state(good, "Loaded")).message is None
        assert (await pod.state(other, "Failed")).reason == "LoadedWithOtherEffect"


async def test_an_adapter_that_a_killed_agent_loaded_is_checked_before_it_serves(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one, two = make_adapter(base, tmp_path / "one", seed=1), make_adapter(base, tmp_path / "two", seed=2)
    async with serving(base, tmp_path) as (pod, session, url):
        adapter = pod.publish(one, "good", 4, recorded_effect(base, one))
        pod.want(adapter)
        await pod.state(adapter, "Loaded")
        await pod.kill()
        # A checked adapter stays loaded through a restart of the agent.
        pod.told.clear()
        await pod.start(session, url, base_model_name=BASE)
        pod.want(adapter)
        await pod.state(adapter, "Loaded")
        assert {item.state for told in pod.told for item in told.adapters} <= {"Loaded"}
        await pod.kill()
        # The agent was killed after a load and before its check.
        folder = pod.dir / adapter.engine_name
        (folder / UNCHECKED_FILE).touch()
        (folder / EFFECT_FILE).write_text(recorded_effect(base, two).model_dump_json(by_alias=True))
        pod.told.clear()
        await pod.start(session, url, base_model_name=BASE)
        pod.want(adapter)
        assert (await pod.state(adapter, "Failed")).reason == "LoadedWithOtherEffect"
        assert "Loaded" not in {item.state for told in pod.told for item in told.adapters}


def record(base: list[float], adapter: list[float]) -> Effect:
    tokens = list(range(len(base)))
    return Effect(prompts=[EffectPrompt(prompt=[1], tokens=tokens, base=base, adapter=adapter)])


def answers(values: list[float]) -> list[dict[int, float]]:
    return [dict(enumerate(values))]


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_base_model_of_another_precision_widens_the_tolerance(shift: float) -> None:
    """The base model's own answers differ by `shift`. The adapter's change differs by 0.6 of 1 nat."""
    effect = record([-1.0, -2.0, -3.0, -4.0], [-2.0, -1.0, -4.0, -3.0])
    base = [-1.0 + shift, -2.0 - shift, -3.0 + shift, -4.0 - shift]
    adapter = [base[0] - 0.4, base[1] + 0.4, base[2] - 0.4, base[3] + 0.4]
    if shift:
        assert check_effect(effect, answers(base), answers(adapter)) is None
        return
    with pytest.raises(AdapterError, match="another effect") as caught:
        check_effect(effect, answers(base), answers(adapter))
    assert caught.value.reason == "LoadedWithOtherEffect"


def test_tokens_that_an_engine_does_not_report_are_as_likely_as_its_last() -> None:
    effect = record([-0.1, -3.0, -20.0], [-4.0, -0.1, -25.0])
    assert check_effect(effect, [{0: -0.1, 1: -3.0, 9: -5.0}], [{1: -0.1, 0: -4.0, 8: -5.0}]) is None


def test_the_prompts_are_ordinary_tokens_of_the_vocabulary() -> None:
    for vocabulary in (2, 30, 97, 726, 32_000, 262_144):
        found = prompts(vocabulary, None)
        assert len(found) == CANDIDATES and all(len(ids) == LENGTH for ids in found)
        assert all(0 <= token < vocabulary for ids in found for token in ids)
    assert all(ids[0] == 1 and len(ids) == LENGTH + 1 for ids in prompts(32_000, 1))
    assert not {1000, 1001} & {token for ids in prompts(32_000, None, frozenset({1000, 1001})) for token in ids}
    assert len({tuple(ids) for ids in prompts(32_000, None)}) == CANDIDATES


def test_a_manifest_with_a_record_of_another_shape_is_invalid() -> None:
    with pytest.raises(ValueError, match="same length"):
        EffectPrompt(prompt=[1], tokens=[1, 2], base=[0.0], adapter=[0.0, 0.0])
    for bad in ({"prompt": []}, {"prompt": [-1]}, {"prompt": [1] * 65}):
        with pytest.raises(ValueError, match="prompt"):
            EffectPrompt.model_validate(bad)
