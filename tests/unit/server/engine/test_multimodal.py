"""Adapters of multimodal models: the engine serves them as transformers and peft do, under the names that vLLM looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoTokenizer
from worlds.architectures import MULTIMODAL
from worlds.engine import BASE, make_tokenizer, running

PROMPT, TOKENS = "What is the capital of France?", 8


def whole_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def answer(model: Any, folder: Path) -> list[int]:
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(PROMPT)])
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -TOKENS:].tolist()


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "llama4", "qwen3_vl"])
async def test_an_adapter_of_the_whole_model_is_served(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    torch.manual_seed(5)
    MULTIMODAL[name]().save_pretrained(folder)
    make_tokenizer(folder)
    model = whole_model(folder)
    targets = [
        key
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "vis" not in key and key.endswith((".q_proj", ".o_proj"))
    ]
    assert targets
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for key, weight in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.5)
    tuned.save_pretrained(tmp_path / "adapter")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = answer(PeftModel.from_pretrained(whole_model(folder), tmp_path / "adapter"), folder)
    plain = answer(whole_model(folder), folder)
    assert wanted != plain
    async with running(folder) as api:
        assert (await api.load("tuned", tmp_path / "adapter"))[0] == 200
        for who, tokens in ((BASE, plain), ("tuned", wanted)):
            said = await api.complete(PROMPT, who, max_tokens=TOKENS, ignore_eos=True)
            assert said == tokenizer.decode(tokens, skip_special_tokens=True)
