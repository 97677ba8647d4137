"""A tiny base model, its tokenizer and adapters, made on the spot for the engine's tests, and a running server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp.test_utils import TestClient, TestServer
from graft_server.engine.app import Server
from graft_server.engine.model import load_base_model
from graft_server.engine.settings import Settings
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
BASE = "tiny"


def make_base(directory: Path) -> Path:
    """Saves a Llama of random weights whose tokens are single characters."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)

    return make_network(directory, LlamaConfig)


def make_network(directory: Path, kind: Any, **config: Any) -> Path:
    """Saves random weights of a causal model beside the tokenizer; `kind` is the class of its config."""
    torch.manual_seed(7)
    shape = {
        "vocab_size": len(CHARACTERS) + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if "n_embd" in config:
        shape = {name: shape[name] for name in ("vocab_size", "initializer_range", "eos_token_id", "bos_token_id")}
    AutoModelForCausalLM.from_config(kind(**{**shape, **config})).save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, seed: int, **config: Any) -> Path:
    """Saves an adapter whose B matrices are random, so that it changes every answer."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(directory)
    return directory


def expected(base: Path, adapter: Path | None, prompt: str, tokens: int) -> str:
    """What plain transformers and peft answer, greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


class Api:
    """A client of a running engine, in the words of the tests."""

    def __init__(self, server: Server, client: TestClient[Any, Any]) -> None:
        self.server = server
        self.engine = server.engine
        self.client = client

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.client.post(path, json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(path) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def load(self, name: str, path: Path | str, **more: Any) -> tuple[int, Any]:
        return await self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)

    async def unload(self, name: str) -> tuple[int, Any]:
        return await self.post("/v1/unload_lora_adapter", lora_name=name)

    async def complete(self, prompt: str, model: str = BASE, **more: Any) -> str:
        body = {"prompt": prompt, "model": model, "temperature": 0, "max_tokens": 24, **more}
        status, answer = await self.post("/v1/completions", **body)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    async def stream(self, path: str, **body: Any) -> list[Any]:
        async with self.client.post(path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            lines = [line for line in (await response.text()).split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            await asyncio.sleep(0.005)

    def slow_down(self, seconds: float = 0.02) -> None:
        """Makes every forward pass take a while, so that a test can act during an answer."""
        forward = self.engine.residency.forward

        def slowly(*arguments: Any) -> Any:
            time.sleep(seconds)
            return forward(*arguments)

        self.engine.residency.forward = slowly  # type: ignore[method-assign]


@asynccontextmanager
async def running(base: Path, **settings: Any) -> AsyncIterator[Api]:
    """A server on a free port, with room for several adapters unless told otherwise."""
    defaults = {"max_loras": 4, "max_cpu_loras": 4, "runtime_loading": True, "max_num_seqs": 8}
    chosen = Settings(model=str(base), served_model_names=(BASE,), **{**defaults, **settings})
    server = Server(chosen, load_base_model(chosen))
    try:
        async with TestClient(TestServer(server.application())) as client:
            yield Api(server, client)
    finally:
        await server.close()
