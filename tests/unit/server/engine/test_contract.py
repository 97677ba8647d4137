"""vLLM's contract for loading and unloading adapters at runtime, and errors of invalid adapters."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_server.engine.settings import parse
from safetensors.torch import load_file, save_file
from worlds.engine import BASE, Api, make_adapter, running

NAME = "shop--support-1.0.0--0123456789ab"
FILES = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base, base.parent / "adapter", seed=1)


def error(body: Any) -> tuple[str, Any, int]:
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["type"], body["error"]["param"], body["error"]["code"]


def edited(adapter: Path, to: Path, **config: Any) -> Path:
    """Copy an adapter and change some keys of its config."""
    shutil.copytree(adapter, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return to


async def test_an_adapter_is_loaded_listed_and_unloaded(api: Api, adapter: Path, base: Path) -> None:
    assert await api.load(NAME, adapter, unknown_field=1) == (
        200,
        f"Success: LoRA adapter '{NAME}' added successfully.",
    )

    _, models = await api.get("/v1/models")
    assert models["object"] == "list"
    first, second = models["data"]
    assert (first["id"], first["root"], first["parent"], first["max_model_len"]) == (BASE, str(base), None, 256)
    assert (second["id"], second["root"], second["parent"]) == (NAME, str(adapter), BASE)
    assert second["max_model_len"] is None and second["object"] == "model"
    assert second["created"] > 0 and second["permission"] and second["owned_by"]

    assert await api.unload(NAME) == (200, f"Success: LoRA adapter '{NAME}' removed successfully.")
    _, models = await api.get("/v1/models")
    assert [card["id"] for card in models["data"]] == [BASE]


async def test_the_routes_exist_only_if_runtime_loading_is_allowed(base: Path, adapter: Path) -> None:
    async with running(base, runtime_loading=False) as api:
        status, body = await api.load(NAME, adapter)
        assert status == 404 and error(body)[2] == 404
        assert (await api.unload(NAME))[0] == 404
    flags = ["--model", "m", "--enable-lora", "--max-loras", "4"]
    assert not parse(flags, {}).runtime_loading
    assert parse(flags, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}).runtime_loading
    assert parse(flags, {}).max_cpu_loras == 4 and parse(flags, {}).served_model_names == ("m",)
    with pytest.raises(SystemExit):
        parse([*flags, "--max-cpu-loras", "2"], {})


@pytest.mark.parametrize(("name", "path"), [("", "/somewhere"), ("x", "")])
async def test_an_empty_name_or_path_is_refused(api: Api, name: str, path: str) -> None:
    status, body = await api.load(name, path)
    assert (status, error(body)) == (400, ("InvalidUserInput", None, 400))
    status, body = await api.unload("")
    assert (status, error(body)) == (400, ("InvalidUserInput", None, 400))


async def test_the_name_of_the_base_model_is_refused(api: Api, adapter: Path) -> None:
    status, body = await api.load(BASE, adapter)
    assert (status, error(body)[0]) == (400, "InvalidUserInput")


async def test_a_loaded_name_is_refused_unless_load_inplace_is_set(api: Api, adapter: Path, base: Path) -> None:
    other = make_adapter(base, base.parent / "inplace", seed=2)
    await api.load(NAME, adapter)
    before = await api.complete("hello", NAME)
    status, body = await api.load(NAME, other)
    assert (status, error(body)[0]) == (400, "InvalidUserInput")
    assert "has already been loaded" in body["error"]["message"]

    status, _ = await api.load(NAME, other, load_inplace=True)
    assert status == 200
    assert await api.complete("hello", NAME) != before
    await api.until(lambda: len(api.engine.residency.names()) == 1)


@pytest.mark.parametrize(
    ("content_type", "payload"),
    [
        ("application/json", '{"lora_name": "x"}'),
        ("application/json", '{"lora_path": "/x"}'),
        ("application/json", "{not json"),
        ("application/json", "[]"),
        ("application/json", '{"lora_name": 3, "lora_path": "/x"}'),
        ("text/plain", '{"lora_name": "x", "lora_path": "/x"}'),
        ("application/x-www-form-urlencoded", "lora_name=x"),
    ],
)
async def test_a_body_that_is_not_a_load_request_is_refused(api: Api, content_type: str, payload: str) -> None:
    headers = {"Content-Type": content_type}
    async with api.client.post("/v1/load_lora_adapter", data=payload, headers=headers) as response:
        body = await response.json()
        assert (response.status, error(body)[0]) == (400, "Bad Request")
    if payload == '{"lora_name": "x"}':
        assert "lora_path" in body["error"]["message"] and error(body)[1] == "lora_path"


@pytest.mark.parametrize("missing", ["all", *FILES])
async def test_a_missing_file_is_reported_as_not_found(api: Api, adapter: Path, tmp_path: Path, missing: str) -> None:
    path = tmp_path / "copy"
    if missing != "all":
        shutil.copytree(adapter, path)
        (path / missing).unlink()
    status, body = await api.load("x", path)
    assert (status, error(body)) == (404, ("NotFoundError", None, 404))
    assert body["error"]["message"] == f"Loading lora x failed: No adapter found for {path}"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"peft_type": "IA3"}, "only LORA and PROMPT_TUNING"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"r": 64}, "LoRA rank 64 is greater than max_lora_rank 16."),
        ({"rank_pattern": {"q_proj": 32}}, "LoRA rank 32"),
        ({"r": 8}, "shape"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "module names"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
    ],
)
async def test_an_unsupported_adapter_is_refused(
    api: Api, adapter: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    status, body = await api.load("x", edited(adapter, tmp_path / "edited", **config))
    assert (status, error(body)) == (500, ("InternalServerError", None, 500))
    assert says in body["error"]["message"]
    assert len((await api.get("/v1/models"))[1]["data"]) == 1
    assert api.engine.residency.names() == []


async def test_a_pickle_is_refused(api: Api, adapter: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "pickle"))
    torch.save(load_file(path / FILES[1]), path / "adapter_model.bin")
    (path / FILES[1]).unlink()
    status, body = await api.load("x", path)
    assert status == 500 and "pickle" in body["error"]["message"]


def _foreign_module(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.other.lora_A.weight"] = torch.zeros(4, 32)


def _base_weight(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(98, 32)


def _half_a_pair(tensors: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _wrong_shape(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(4, 33)


def _nothing(tensors: dict[str, Any]) -> None:
    tensors.clear()


@pytest.mark.parametrize("spoil", [_foreign_module, _base_weight, _half_a_pair, _wrong_shape, _nothing])
async def test_weights_that_do_not_fit_the_model_are_refused(
    api: Api, adapter: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "spoilt"))
    tensors = load_file(path / FILES[1])
    spoil(tensors)
    save_file(tensors, path / FILES[1])
    status, body = await api.load("x", path)
    assert (status, error(body)[0]) == (500, "InternalServerError")


async def test_a_truncated_file_is_refused(api: Api, adapter: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "truncated"))
    whole = (path / FILES[1]).read_bytes()
    (path / FILES[1]).write_bytes(whole[: len(whole) // 2])
    status, body = await api.load("x", path)
    assert (status, error(body)[0]) == (500, "InternalServerError")


async def test_an_unload_of_an_unknown_name_is_refused(api: Api) -> None:
    status, body = await api.unload("nobody")
    assert (status, error(body)) == (404, ("NotFoundError", None, 404))
    assert "cannot be found" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_for_an_unknown_model_is_refused(api: Api, path: str) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "model": "nobody"}
    status, answer = await api.post(path, **body)
    assert (status, error(answer)) == (404, ("NotFoundError", "model", 404))


async def test_api_keys_protect_only_the_v1_routes(base: Path) -> None:
    async with running(base, api_keys=("secret", "other")) as api:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            async with api.client.get("/v1/models", headers=headers) as response:
                assert (response.status, await response.json()) == (401, {"error": "Unauthorized"})
        async with api.client.get("/v1/models", headers={"Authorization": "Bearer other"}) as response:
            assert response.status == 200
        assert (await api.get("/health"))[0] == 200
        assert (await api.get("/metrics"))[0] == 200


async def test_parallel_loads_succeed_but_only_one_of_the_same_name(api: Api, adapter: Path) -> None:
    answers = await asyncio.gather(*(api.load(f"a{i}", adapter) for i in range(4)), api.load("same", adapter))
    assert [status for status, _ in answers] == [200] * 5
    twice = await asyncio.gather(api.load("twice", adapter), api.load("twice", adapter))
    assert sorted(status for status, _ in twice) == [200, 400]


async def test_health_version_and_metrics_are_served(api: Api, adapter: Path) -> None:
    assert (await api.get("/health"))[0] == 200
    assert "version" in (await api.get("/version"))[1]
    await api.load(NAME, adapter)
    await api.complete("hello", NAME, ignore_eos=True, max_tokens=5)
    _, text = await api.get("/metrics")
    assert 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""}' in text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
    assert 'vllm:prompt_tokens_total{model_name="tiny"} 5.0' in text
    assert 'vllm:generation_tokens_total{model_name="tiny"} 5.0' in text
    assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in text
    assert f'graft_engine_lora_resident{{lora_name="{NAME}"}} 1.0' in text

    api.slow_down()
    request = asyncio.create_task(api.complete("hello", NAME, ignore_eos=True))
    await api.until(lambda: api.engine.activity().running == 1)
    assert f'running_lora_adapters="{NAME}"' in (await api.get("/metrics"))[1]
    await request
