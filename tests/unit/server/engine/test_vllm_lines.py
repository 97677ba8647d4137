"""vLLM's contract for adapters at runtime: one case for each line of it, with the answer that a client sees."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graft_server.engine.settings import LORA_RANKS, parse
from worlds.engine import BASE, Api, make_adapter, make_base, running

NAME = "shop--support-1.0.0--0123456789ab"


@dataclass(frozen=True)
class Files:
    """Directories on the engine's disk."""

    base: Path
    good: Path
    rank32: Path
    dora: Path
    biased: Path
    foreign: Path
    empty: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("lines")
    base = make_base(root / "base")
    foreign = make_adapter(base, root / "foreign", seed=1)
    config = foreign / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"qkv_proj"'))
    (root / "empty").mkdir()
    return Files(
        base=base,
        good=make_adapter(base, root / "good", seed=1),
        rank32=make_adapter(base, root / "rank32", seed=1, r=32),
        dora=make_adapter(base, root / "dora", seed=1, use_dora=True),
        biased=make_adapter(base, root / "biased", seed=1, bias="lora_only"),
        foreign=foreign,
        empty=root / "empty",
    )


@pytest.fixture
async def api(files: Files) -> AsyncIterator[Api]:
    """Run an engine that has loaded NAME."""
    async with running(files.base) as api:
        assert (await api.load(NAME, files.good))[0] == 200
        yield api


@dataclass(frozen=True)
class Line:
    """A line of the contract: the call, and the status, type, param and words of the answer."""

    says: str
    do: Callable[[Api, Files], Awaitable[tuple[int, Any]]]
    status: int
    type: str | None = None
    words: str = ""
    param: str | None = None


def load(name: str, path: str, **more: Any) -> Callable[[Api, Files], Awaitable[tuple[int, Any]]]:
    """Return a call that loads an adapter. `path` names a field of Files, or is a path itself."""
    return lambda api, files: api.load(name, str(getattr(files, path, path)), **more)


def post(path: str, **body: Any) -> Callable[[Api, Files], Awaitable[tuple[int, Any]]]:
    return lambda api, files: api.post(path, **body)


async def as_form(api: Api, files: Files) -> tuple[int, Any]:
    async with api.client.post("/v1/load_lora_adapter", data={"lora_name": "x", "lora_path": "y"}) as response:
        return response.status, await response.json()


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GONE = "Loading lora x failed: No adapter found for"
LINES = [
    Line("load succeeds with bare text", load("x", "good"), 200, words="Success: LoRA adapter 'x' added successfully."),
    Line("load_inplace replaces", load(NAME, "good", load_inplace=True), 200, words="added successfully."),
    Line("unknown fields are ignored", load("x", "good", base_model_name="b", other=1), 200, words="added"),
    Line("unload succeeds with bare text", post(UNLOAD, lora_name=NAME), 200, words=f"'{NAME}' removed successfully."),
    Line("an empty name", load("", "good"), 400, "InvalidUserInput", "must be provided"),
    Line("an empty path", load("x", ""), 400, "InvalidUserInput", "must be provided"),
    Line("the base model's name", load(BASE, "good"), 400, "InvalidUserInput", "base model"),
    Line("already loaded", load(NAME, "good"), 400, "InvalidUserInput", "has already been loaded"),
    Line("the name is missing", post(LOAD, lora_path="x"), 400, "Bad Request", "lora_name", "lora_name"),
    Line("the path is missing", post(LOAD, lora_name="x"), 400, "Bad Request", "lora_path", "lora_path"),
    Line("unload without a name", post(UNLOAD), 400, "Bad Request", "lora_name", "lora_name"),
    Line("a wrong content type", as_form, 400, "Bad Request", "application/json"),
    Line("no directory", load("x", "/nowhere"), 404, "NotFoundError", f"{GONE} /nowhere"),
    Line("an empty directory", load("x", "empty"), 404, "NotFoundError", GONE),
    Line("rank above max_lora_rank", load("x", "rank32"), 500, "InternalServerError", "greater than max_lora_rank 16"),
    Line("DoRA", load("x", "dora"), 500, "InternalServerError", "DoRA"),
    Line("bias", load("x", "biased"), 500, "InternalServerError", "bias is not supported"),
    Line("modules the engine lacks", load("x", "foreign"), 500, "InternalServerError", "'qkv_proj'"),
    Line("unload of an unknown name", post(UNLOAD, lora_name="x"), 404, "NotFoundError", "cannot be found"),
    Line(
        "completion with an unknown model",
        post("/v1/completions", model="x", prompt="x"),
        404,
        "NotFoundError",
        "The model `x` does not exist.",
        "model",
    ),
    Line(
        "chat with an unknown model",
        post("/v1/chat/completions", model="x", messages=[{"role": "user", "content": "x"}]),
        404,
        "NotFoundError",
        "The model `x` does not exist.",
        "model",
    ),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.says)
async def test_the_engine_answers_as_the_contract_says(api: Api, files: Files, line: Line) -> None:
    status, body = await line.do(api, files)
    assert status == line.status, body
    if line.type is None:
        assert isinstance(body, str) and line.words in body
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        error = body["error"]
        assert (error["type"], error["param"], error["code"]) == (line.type, line.param, line.status)
        assert line.words in error["message"]
    listed = {card["id"] for card in (await api.get("/v1/models"))[1]["data"]}
    wanted = {BASE, NAME} | (
        {"x"} if line.says in ("load succeeds with bare text", "unknown fields are ignored") else set()
    )
    assert listed == wanted - ({NAME} if line.says == "unload succeeds with bare text" else set())


async def test_the_api_key_protects_only_the_v1_routes(files: Files) -> None:
    async with running(files.base, api_keys=("secret",)) as api:
        assert await api.get("/v1/models") == (401, {"error": "Unauthorized"})
        assert await api.load("x", files.good) == (401, {"error": "Unauthorized"})
        assert (await api.get("/health"))[0] == 200 and (await api.get("/metrics"))[0] == 200


async def test_the_model_list_has_the_fields_of_the_contract(api: Api, files: Files) -> None:
    _, models = await api.get("/v1/models")
    base, adapter = models["data"]
    for card in (base, adapter):
        keys = {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
        assert set(card) == keys and card["object"] == "model"
    assert (base["id"], base["parent"], base["max_model_len"]) == (BASE, None, 256)
    assert (adapter["id"], adapter["root"], adapter["parent"]) == (NAME, str(files.good), BASE)
    assert adapter["max_model_len"] is None


async def test_an_evicted_adapter_stays_listed_and_is_read_again(files: Files, tmp_path: Path) -> None:
    """The engine reads it again from its path. The registry listed it all the time."""
    async with running(files.base, max_loras=1, max_cpu_loras=1) as api:
        for name in ("a", "b"):
            assert (await api.load(name, Path(shutil.copytree(files.good, tmp_path / name))))[0] == 200
        await api.until(lambda: api.engine.residency.names() == ["b"])
        assert [card["id"] for card in (await api.get("/v1/models"))[1]["data"]] == [BASE, "a", "b"]
        assert await api.complete("hello", "a") == await api.complete("hello", "b")


async def test_the_metric_for_lora_requests_follows_the_contract(api: Api) -> None:
    _, text = await api.get("/metrics")
    assert text.count("vllm:lora_requests_info{") == 1
    assert 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""}' in text


def test_the_flags_have_the_defaults_of_the_contract() -> None:
    settings = parse(["--model", "m"], {})
    assert (settings.max_loras, settings.max_cpu_loras, settings.max_lora_rank) == (1, 1, 16)
    assert parse(["--model", "m", "--max-loras", "3"], {}).max_cpu_loras == 3
    assert LORA_RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--max-lora-rank", "12"], {})


async def test_without_runtime_loading_the_routes_do_not_exist(files: Files) -> None:
    async with running(files.base, runtime_loading=False) as api:
        assert (await api.load("x", files.good))[0] == 404 and (await api.unload("x"))[0] == 404
