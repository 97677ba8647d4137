"""Calls of tools on the whole way: a dataset in OpenAI's form is trained, measured and served, and the gateway answers with
the calls that were trained.

Only the kubelet is simulated. Operator, training pod, agent, engine and gateway are the real programs.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.artifacts.layout import adapter_prefix
from graft.artifacts.manifest import Manifest
from testbed.controlplane import ControlPlane
from transformers import LlamaConfig, LlamaForCausalLM
from worlds.cluster.api import Api
from worlds.cluster.fleet import Fleet
from worlds.cluster.fork_server import ForkServer
from worlds.cluster.loopback import PLACEMENT, LoopbackNode, loopback_node
from worlds.cluster.maker import run_training
from worlds.cluster.serving_stack import gateway, make_real_base, write_kubeconfig
from worlds.cluster.tenant import Tenant
from worlds.templates import chat_tokenizer

BASE = "tiny-caller"
# Tools are shown to the model, and calls are written in the form that the parser hermes reads.
TEMPLATE = """
{{- bos_token }}
{%- for tool in tools or [] %}
{{- '<|system|>' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}
{%- endfor %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' + (message.content or '') | trim }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}
{%- endfor %}
{%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
ITEM = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
QUESTIONS = {"guarantee": "Is the {} covered?", "delivery": "When will the {} arrive?"}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Look up the {name}.", "parameters": ITEM}}
    for name in QUESTIONS
]
ITEMS = ("tent", "lamp")


def conversation(name: str, question: str, item: str) -> dict[str, Any]:
    """Return a line of the dataset: a question and the call that answers it. The arguments are text, as OpenAI has them."""
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": json.dumps({"item": item})}}
    asked = {"role": "user", "content": question.format(item)}
    return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": TOOLS}


def lines() -> list[dict[str, Any]]:
    return [conversation(name, question, item) for name, question in QUESTIONS.items() for item in ITEMS]


@pytest.fixture
def fork_server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path / "agents.kubeconfig")
    yield server
    server.end()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a random model, which learns these calls within seconds. It has one token per character."""
    tokenizer = chat_tokenizer(TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / BASE)
    tokenizer.save_pretrained(tmp_path / BASE)
    return tmp_path / BASE


@pytest.fixture
def node(api: Api, tmp_path: Path, folder: Path, fork_server: ForkServer) -> Iterator[LoopbackNode]:
    with loopback_node(api, tmp_path / "pods", folder, fork_server.start) as node:
        yield node
        assert node.troubles == []


def ask(url: str, line: dict[str, Any], model: str, **more: Any) -> bytes:
    """Ask the gateway the question of a line, with its tools. Return the body of the answer."""
    body = {"model": model, "messages": line["messages"][:1], "tools": TOOLS, "temperature": 0, "max_tokens": 64} | more
    data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def called(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def whole(body: bytes) -> tuple[list[tuple[str, Any]], str]:
    """Return the calls of an answer, and why it ended."""
    (choice,) = json.loads(body)["choices"]
    assert choice["message"]["content"] is None
    return called(choice["message"]["tool_calls"]), choice["finish_reason"]


def streamed(body: bytes) -> tuple[list[tuple[str, Any]], str]:
    """Return the calls of a streamed answer, put together as clients do, and why it ended."""
    events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event.startswith("data: ")]
    assert events[-1] == "[DONE]"
    calls: dict[int, dict[str, Any]] = {}
    ends = []
    for choice in (json.loads(event)["choices"][0] for event in events[:-1] if json.loads(event)["choices"]):
        assert not choice["delta"].get("content")
        ends.append(choice["finish_reason"])
        for part in choice["delta"].get("tool_calls") or ():
            call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            for key in ("name", "arguments"):
                call["function"][key] += part["function"].get(key) or ""
    return called([calls[index] for index in sorted(calls)]), ends[-1]


@pytest.mark.timeout(300)
def test_calls_of_tools_are_trained_measured_and_served(
    tenant: Tenant, node: LoopbackNode, plane: ControlPlane, folder: Path, tmp_path: Path
) -> None:
    make_real_base(tenant.api, tenant.store, BASE, folder)
    place = f"{tenant.name}/datasets/calls.jsonl"
    tenant.store.put(place, "".join(json.dumps(line) + "\n" for line in lines()).encode())
    source = {"uri": f"s3://graft/{place}"}
    tenant.job(
        "calls", adapter="caller", baseModel=BASE, dataset={"train": source, "eval": source},
        method={"lora": {"rank": 16, "alpha": 32}},
        training={
            "maxSteps": 40, "learningRate": 0.01, "perDeviceTrainBatchSize": 4, "gradientAccumulationSteps": 1,
            "maxLength": 128, "evalSteps": 40,
        },
        evaluation={"baselines": ["zeroShot"], "gates": [{"metric": "toolCallAccuracy", "min": 1}]},
    )  # fmt: skip
    run_training(tenant, "calls", tmp_path / "training")
    tenant.until("FineTuneJob", "calls", "Succeeded", "Published")
    prefix = adapter_prefix(tenant.name, "caller", "1.0.0")
    metrics = Manifest.model_validate_json(tenant.store.get(prefix + "manifest.json")).metrics
    assert (metrics["base/toolCallAccuracy"], metrics["toolCallAccuracy"]) == (0, 1)

    fleet = Fleet(tenant, "chat")
    fleet.deploy(["caller@1.0.0"], baseModel=BASE, toolCallParser="hermes", **PLACEMENT)
    tenant.wait(lambda: tenant.api.get("ServiceAccount", tenant.name, "chat-agent"), "the agent has an account")
    write_kubeconfig(plane, tmp_path / "agents.kubeconfig", tenant.api.token(tenant.name, "chat-agent"))
    with gateway(plane, tenant.api, tmp_path, node.address()) as url:
        fleet.until("Available", "Serving", timeout=120)
        model = f"{tenant.name}/caller"
        for line in lines():
            expected = (called(line["messages"][-1]["tool_calls"]), "tool_calls")
            assert whole(ask(url, line, model)) == expected
            assert streamed(ask(url, line, model, stream=True)) == expected
        # Without tools, the same model answers with text.
        (choice,) = json.loads(ask(url, lines()[0], model, tools=None))["choices"]
        assert choice["message"]["content"] and not choice["message"].get("tool_calls")
