"""The agent and the operator's flags with real vLLM: the contract of its endpoints, and the answers of each adapter."""

from __future__ import annotations

import asyncio
import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from graft.api import engineargs
from graft.artifacts.manifest import Effect, EffectPrompt
from graft.contracts.agent import Wanted, WantedAdapter
from graft.contracts.enginekeys import fingerprint
from graft.toolcalls import PARSERS
from graft_server.callers import AGENT, FREE, GATEWAY, ROUTES
from handover.real_vllm import COMMAND, GATEWAY_KEY, GPU, MAX_RANK, Vllm
from safetensors.torch import load_file, save_file
from worlds.agent import Pod
from worlds.engine import expected, make_adapter, recorded_effect
from worlds.serving import eventually
from worlds.templates import ANSWERS

GOLDEN = Path(__file__).parents[1] / "unit" / "operator" / "manifests" / "golden" / "output"
BASE = "big"
PROMPT = "my please parcel"  # no answer to it ends early or has two tokens of nearly the same probability
TOKENS = 12
NAMES_CHECKED = (0, 32)  # the first version known to refuse an adapter with the base model's name; 0.26 accepted it


def golden_commands() -> list[list[str]]:
    """Return the command of every pod with vLLM in the golden files."""
    found = []
    for path in sorted(GOLDEN.glob("adapterdeployment-*.yaml")):
        for item in yaml.safe_load_all(path.read_text()):
            if item["kind"] == "Deployment":
                (container,) = item["spec"]["template"]["spec"]["containers"]
                found += [container["command"]] if container["command"][0] == "vllm" else []
    return found


def test_vllm_accepts_every_flag_of_every_pod() -> None:
    commands = golden_commands()
    assert len(commands) >= 4
    done = subprocess.run([*COMMAND, "parse"], input=json.dumps(commands), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    understood = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for command, found in zip(commands, understood, strict=True):
        flags = dict(pairwise(command))
        for flag, name, kind in (
            ("--max-loras", "max_loras", int),
            ("--max-lora-rank", "max_lora_rank", int),
            ("--max-cpu-loras", "max_cpu_loras", int),
            ("--max-num-seqs", "max_num_seqs", int),
            ("--max-model-len", "max_model_len", int),
            ("--tensor-parallel-size", "tensor_parallel_size", int),
            ("--gpu-memory-utilization", "gpu_memory_utilization", float),
            ("--quantization", "quantization", str),
            ("--shutdown-timeout", "shutdown_timeout", int),
            ("--tool-call-parser", "tool_call_parser", str),
        ):
            if flag in flags:
                assert found[name] == kind(flags[flag]), (flag, command)
        assert found["enable_lora"] is True
        assert found["enable_auto_tool_choice"] is ("--enable-auto-tool-choice" in command)


# Flags of spec.engineArgs whose value is not a number.
WORDS = {
    "attention-backend": "FLASH_ATTN", "chat-template-content-format": "auto", "default-chat-template-kwargs": "{}",
    "kv-cache-dtype": "auto", "limit-mm-per-prompt": "{}", "logprobs-mode": "raw_logprobs", "moe-backend": "auto",
    "override-generation-config": "{}", "performance-mode": "balanced", "reasoning-parser": "qwen3",
    "response-role": "assistant", "scheduling-policy": "fcfs", "tokenizer-mode": "auto",
}  # fmt: skip


def test_vllm_has_every_flag_that_engine_args_may_have() -> None:
    flags = [f"--{flag}={WORDS.get(flag, 2)}" for flag in engineargs.VALUES]
    command = ["vllm", "serve", "model", *flags, *(f"--{flag}" for flag in engineargs.SWITCHES)]
    done = subprocess.run([*COMMAND, "parse"], input=json.dumps([command]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["seed"], found["enforce_eager"], found["reasoning_parser"]) == (2, True, "qwen3")


def test_calls_of_tools_are_read_as_vllms_parsers_read_them() -> None:
    given = [(name, text, answer) for name, found in ANSWERS.items() for text, answer in found]
    asked = json.dumps([(name, text) for name, text, _ in given])
    done = subprocess.run([*COMMAND, "calls"], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert read == [[[call.name, call.arguments] for call in answer.calls] for _, _, answer in given]
    for name, text, answer in given:
        assert PARSERS[name].parse(text) == answer


@pytest.fixture(scope="module")
def folders(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write adapters that each change every answer. The rank of `wide` is above the max_lora_rank of vLLM."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": make_adapter(vllm.base, root / "a", seed=1),
        "b": make_adapter(vllm.base, root / "b", seed=2, target_modules="all-linear"),
        "c": make_adapter(vllm.base, root / "c", seed=3),
        "wide": make_adapter(vllm.base, root / "wide", seed=4, r=2 * MAX_RANK),
    }


async def post(session: aiohttp.ClientSession, vllm: Vllm, path: str, **body: Any) -> tuple[int, Any]:
    async with session.post(vllm.url + path, json=body, headers=vllm.headers(path)) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if answer.content_type == "application/json" else text


async def version(session: aiohttp.ClientSession, vllm: Vllm) -> tuple[int, ...]:
    async with session.get(f"{vllm.url}/version", headers=vllm.headers("/version")) as answer:
        return tuple(int(part) for part in (await answer.json())["version"].split(".")[:2])


async def ask(session: aiohttp.ClientSession, vllm: Vllm, model: str, prompt: str = PROMPT) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    status, answer = await post(session, vllm, "/v1/completions", **body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


async def test_vllm_answers_as_the_contract_says(vllm: Vllm, folders: dict[str, Path]) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    async with aiohttp.ClientSession() as session:

        async def case(path: str, status: int, kind: str, words: str, **body: Any) -> None:
            found, answer = await post(session, vllm, path, **body)
            error = answer["error"]
            assert (found, error["type"]) == (status, kind) and words in error["message"], (body, found, answer)

        a = {"lora_name": "contract", "lora_path": str(folders["a"])}
        assert await post(session, vllm, load, **a) == (200, "Success: LoRA adapter 'contract' added successfully.")
        await case(load, 400, "InvalidUserInput", "has already been loaded", **a)
        await case(load, 400, "InvalidUserInput", "must be provided", lora_name="", lora_path="")
        if await version(session, vllm) >= NAMES_CHECKED:
            await case(load, 400, "InvalidUserInput", "conflicts with a served base model", **(a | {"lora_name": BASE}))
        await case(load, 400, "Bad Request", "Field required", lora_name="x")
        await case(load, 404, "NotFoundError", "No adapter found for", lora_name="x", lora_path="/nowhere")
        wide = {"lora_name": "x", "lora_path": str(folders["wide"])}
        await case(load, 500, "InternalServerError", f"greater than max_lora_rank {MAX_RANK}", **wide)
        await case(unload, 404, "NotFoundError", "cannot be found", lora_name="x")
        await case("/v1/completions", 404, "NotFoundError", "does not exist", model="x", prompt="hello")
        async with session.get(f"{vllm.url}/v1/models", headers=vllm.headers("/v1/models")) as answer:
            models = {item["id"]: item for item in (await answer.json())["data"]}
        assert models["contract"]["root"] == str(folders["a"]) and models["contract"]["parent"] == BASE
        assert models[BASE]["parent"] is None and models[BASE]["max_model_len"] == 256
        assert await post(session, vllm, unload, lora_name="contract") == (
            200,
            "Success: LoRA adapter 'contract' removed successfully.",
        )


async def test_every_route_of_vllm_asks_for_a_key_and_knows_its_role(vllm: Vllm) -> None:
    command = [*COMMAND, "routes", *vllm.arguments]
    text = await asyncio.to_thread(subprocess.check_output, command, env=vllm.environment, text=True)
    routes = {(method, path) for method, path in json.loads(text.splitlines()[-1])}
    assert routes >= ROUTES[GATEWAY] | ROUTES[AGENT] | {FREE} and len(routes) > 25
    http = {route for route in routes if route[0]} - {FREE}
    async with aiohttp.ClientSession() as session:

        async def status(method: str, path: str, headers: dict[str, str]) -> int:
            async with session.request(
                method, vllm.url + path.replace("{", "").replace("}", ""), headers=headers
            ) as answer:
                return answer.status

        agent, gateway = vllm.headers("/metrics"), vllm.headers("/v1/completions")
        for method, path in http:
            for headers in ({}, {"Authorization": "Bearer x"}):
                assert await status(method, path, headers) == 401, (method, path)
            for role, headers in ((AGENT, agent), (GATEWAY, gateway)):
                if (method, path) not in ROUTES[role]:
                    assert await status(method, path, headers) == 403, (method, path)
        for method, path in {route for route in ROUTES[AGENT] if route[0] == "GET"} | {FREE}:
            assert await status(method, path, agent) == 200, path
        for path in (path for method, path in routes if method is None):
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(vllm.url + path, headers=gateway)


async def test_the_agent_loads_unloads_and_reloads_adapters_in_vllm(
    vllm: Vllm, folders: dict[str, Path], tmp_path: Path
) -> None:
    answers = {name: expected(vllm.base, folders[name], PROMPT, TOKENS) for name in ("a", "b", "c")}
    bare = expected(vllm.base, None, PROMPT, TOKENS)
    assert len({bare, *answers.values()}) == 4
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pod = Pod(tmp_path / "adapters")
        pod.wanted = Wanted(base_model=BASE, max_lora_rank=64, drain_seconds=0, gateway_keys=[fingerprint(GATEWAY_KEY)])
        pod.access = vllm.access
        pod.load_seconds = 120.0
        await pod.start(session, vllm.url, base_model_name=BASE)
        try:
            wanted = {name: pod.publish(folders[name], name, 4) for name in ("a", "b", "c")}
            wide = pod.publish(folders["wide"], "wide", 2 * MAX_RANK)

            async def until(state: str, *adapters: WantedAdapter) -> None:
                await eventually(lambda: all((one := pod.one(x)) and one.state == state for x in adapters), seconds=200)

            pod.want(*wanted.values(), wide)
            await until("Loaded", *wanted.values())
            await until("Failed", wide)
            refused = pod.one(wide)
            assert refused is not None and refused.reason == "EngineRejected"
            assert f"greater than max_lora_rank {MAX_RANK}" in str(refused.message)  # vLLM's own message

            # Ask more adapters than max_loras at once, and on GPUs the base model among them. Each gives its own answer.
            # On CPUs the base model is asked alone: there vLLM applies the adapter of its last slot to a row without an
            # adapter (lora_indices of -1 in lora/ops/torch_ops).
            async def check() -> None:
                right = [(wanted[name].engine_name, answer) for name, answer in answers.items()]
                right = [*right, *([(BASE, bare)] if GPU else [])] * 3
                found = await asyncio.gather(*(ask(session, vllm, name) for name, _ in right))
                assert found == [answer for _, answer in right]
                assert await ask(session, vllm, BASE) == bare

            await check()

            # A version that is no longer wanted is unloaded, and requests for its name fail.
            pod.want(wanted["a"], wanted["b"])
            await eventually(lambda: pod.one(wanted["c"]) is None, seconds=60)
            status, _ = await post(
                session, vllm, "/v1/completions", model=wanted["c"].engine_name, prompt="hello", max_tokens=1
            )
            assert status == 404
            pod.want(*wanted.values())
            await until("Loaded", wanted["c"])

            # A restarted engine has no adapters. The agent loads all of them again.
            before = pod.told[-1].engine_started
            vllm.kill()
            await eventually(lambda: not pod.told[-1].ready, seconds=60)
            await asyncio.to_thread(vllm.start)
            await until("Loaded", *wanted.values())
            assert pod.told[-1].engine_started != before
            await check()
        finally:
            await pod.kill()


def renamed(adapter: Path, target: Path) -> Path:
    """Copy an adapter, with the names that its tensors have below a multimodal wrapper."""
    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("model.layers", "language_model.model.layers"): tensor for name, tensor in tensors.items()},
        target / "adapter_model.safetensors",
    )
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return target


async def test_an_adapter_that_vllm_loads_without_its_effect_gets_no_request(
    vllm: Vllm, folders: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM loads tensors of other names with a 200 and ignores them. The trainer's record shows it."""
    effects = {name: recorded_effect(vllm.base, folders[name]) for name in ("a", "b")}
    silent = renamed(folders["a"], tmp_path / "renamed")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        body = {"lora_name": "silent", "lora_path": str(silent)}
        assert (await post(session, vllm, "/v1/load_lora_adapter", **body))[0] == 200
        assert await ask(session, vllm, "silent") == await ask(session, vllm, BASE)
        await post(session, vllm, "/v1/unload_lora_adapter", lora_name="silent")

        pod = Pod(tmp_path / "adapters")
        pod.wanted = Wanted(base_model=BASE, max_lora_rank=64, drain_seconds=0, gateway_keys=[fingerprint(GATEWAY_KEY)])
        pod.access, pod.load_seconds = vllm.access, 120.0
        await pod.start(session, vllm.url, base_model_name=BASE)
        try:
            good = [pod.publish(folders[name], name, 4, effect) for name, effect in effects.items()]
            imported = Effect(prompts=[EffectPrompt(prompt=prompt.prompt) for prompt in effects["a"].prompts])
            without = [pod.publish(silent, "trained", 4, effects["a"]), pod.publish(silent, "imported", 4, imported)]
            other = pod.publish(folders["b"], "other", 4, effects["a"])
            wanted = [*good, *without, other]
            pod.want(*wanted)

            def ended() -> bool:
                found = [pod.one(adapter) for adapter in wanted]
                return all(one is not None and one.state in {"Loaded", "Failed"} for one in found)

            await eventually(ended, seconds=200)
            told = {item.adapter: (item.state, item.reason, item.message) for item in pod.told[-1].adapters}
            assert [told[one.adapter] for one in good] == [("Loaded", None, None)] * 2, told
            assert [told[one.adapter][1] for one in without] == ["LoadedWithoutEffect"] * 2, told
            assert told[other.adapter][1] == "LoadedWithOtherEffect", told
            async with session.get(f"{vllm.url}/v1/models", headers=vllm.headers("/v1/models")) as answer:
                listed = {item["id"] for item in (await answer.json())["data"]}
            assert {one.engine_name for one in good} <= listed
        finally:
            await pod.kill()


async def test_running_requests_are_answered_before_vllm_ends(vllm: Vllm) -> None:
    body = {"model": BASE, "prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{vllm.url}/v1/completions", json=body, headers=vllm.headers("/v1/completions")
        ) as answer:
            await answer.content.readline()
            vllm.terminate()
            text = await answer.text()
        assert text.rstrip().endswith("data: [DONE]") and '"error"' not in text
        assert text.count("data: {") > 100
    assert vllm.process is not None
    assert await asyncio.to_thread(vllm.process.wait, 60) == 0
