"""A tiny base model with its tokenizer and adapters, created for the engine's tests, and a running server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp.test_utils import TestClient, TestServer
from graft.artifacts.manifest import Effect
from graft_server.engine.adapters import AdapterWeights
from graft_server.engine.app import Server
from graft_server.engine.model import load_base_model
from graft_server.engine.settings import Settings
from graft_trainer.data.tokens import Task
from graft_trainer.versions.effect import effect_of
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CALLING_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}<assistant>"
)
BASE = "tiny"
torch.set_num_threads(1)  # more threads only slow down such tiny matrices


def make_base(directory: Path) -> Path:
    """Save a Llama with random weights. Its tokens are single characters."""
    make_tokenizer(directory)
    return make_network(directory, LlamaConfig)


def make_tokenizer(directory: Path, template: str | None = TEMPLATE, control: str | None = None) -> None:
    """Save a tokenizer whose tokens are single characters. `control` is one more token, and special."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    if control:
        tokenizer.add_special_tokens({"additional_special_tokens": [control]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def make_seq2seq(directory: Path, kind: Any = T5Config, **config: Any) -> Path:
    """Save an encoder-decoder with random weights and without a chat template."""
    make_tokenizer(directory, template=None)
    torch.manual_seed(7)
    shape = {
        "vocab_size": len(CHARACTERS) + 2,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_factor": 2.0,
    }
    AutoModelForSeq2SeqLM.from_config(kind(**(config or shape))).save_pretrained(directory)
    return directory


def load_network(directory: Path) -> Any:
    """Load the network with plain transformers."""
    seq2seq = AutoConfig.from_pretrained(directory).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def make_network(directory: Path, kind: Any, **config: Any) -> Path:
    """Save a causal model with random weights beside the tokenizer. `kind` is the class of its config."""
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


def make_caller(directory: Path, chat: dict[str, Any], answer: str, control: str | None = None) -> Path:
    """Save a model that answers one conversation with `answer`, and ends it. `chat` has its messages and tools."""
    make_tokenizer(directory, CALLING_TEMPLATE, control)
    make_network(directory, LlamaConfig, max_position_embeddings=512, vocab_size=len(CHARACTERS) + 2 + bool(control))
    tokenizer, network = AutoTokenizer.from_pretrained(directory), load_network(directory)
    prompt = tokenizer.apply_chat_template(
        chat["messages"], tools=chat.get("tools"), tokenize=False, add_generation_prompt=True
    )
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    ids = torch.tensor([before + after])
    labels = torch.tensor([[-100] * len(before) + after])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(500):
        loss = network(input_ids=ids, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, loss
    network.save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, seed: int, **config: Any) -> Path:
    """Save an adapter with random B matrices, so that it changes every answer."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    torch.manual_seed(seed)
    network = load_network(base)
    task = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(network, LoraConfig(**{"task_type": task, **settings}))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(directory)
    return directory


def make_prompt(base: Path, directory: Path, seed: int, tokens: int = 6) -> Path:
    """Save a tuned prompt of random vectors."""
    torch.manual_seed(seed)
    network = load_network(base)
    task = "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(network, PromptTuningConfig(task_type=task, num_virtual_tokens=tokens))
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=1.0)
    model.save_pretrained(directory)
    return directory


def recorded_effect(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Effect:
    """Return the effect that a trainer records for an adapter."""
    model: Any = PeftModel.from_pretrained(load_network(base).to(dtype), adapter)
    task: Task = "seq2seq" if model.config.is_encoder_decoder else "causal"

    @contextmanager
    def opened() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    return effect_of(model.eval(), opened, task, frozenset({0, 1}))


def expected(base: Path, adapter: Path | None, prompt: str, tokens: int) -> str:
    """Return the greedy answer of plain transformers and peft."""
    model: Any = load_network(base)
    seq2seq = model.config.is_encoder_decoder
    tokenizer = AutoTokenizer.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[0]
    # The output of a causal model starts with the prompt, unless the prompt was given as vectors.
    answer = output[ids.shape[1] :] if not seq2seq and output[: ids.shape[1]].equal(ids[0]) else output
    return str(tokenizer.decode(answer, skip_special_tokens=True))


class Api:
    """A client of a running engine."""

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
            assert time.monotonic() < deadline, f"the condition did not become true within {seconds} s"
            await asyncio.sleep(0.005)

    def slow_down(self, seconds: float = 0.02) -> None:
        """Delay every forward pass, so that a test can act while the engine answers."""
        network = self.engine.network
        forward = network._forward

        def slowly(*arguments: Any, **more: Any) -> Any:
            time.sleep(seconds)
            return forward(*arguments, **more)

        network._forward = slowly  # type: ignore[method-assign]

    def hold_up_reads(self) -> tuple[threading.Event, threading.Event]:
        """Hold up every read of an adapter from the disk. The first event tells that one was asked for, and the test
        sets the second to let them go on."""
        read, asked, gate = self.engine._load, threading.Event(), threading.Event()

        def held_up(path: str) -> AdapterWeights:
            asked.set()
            assert gate.wait(20)
            return read(path)

        self.engine._load = held_up
        return asked, gate


@asynccontextmanager
async def running(base: Path, **settings: Any) -> AsyncIterator[Api]:
    """Run a server on a free port. By default it has room for several adapters."""
    defaults = {"max_loras": 4, "max_cpu_loras": 4, "runtime_loading": True, "max_num_seqs": 8}
    chosen = Settings(model=str(base), served_model_names=(BASE,), **{**defaults, **settings})
    server = Server(chosen, load_base_model(chosen))
    try:
        async with TestClient(TestServer(server.application())) as client:
            yield Api(server, client)
    finally:
        await server.close()
