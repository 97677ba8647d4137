"""Adapters with random weights. The benchmarks measure their cost, not their answers."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "examples/tiny-llama/model"


def make_adapters(model: Path, to: Path, count: int, rank: int) -> list[Path]:
    """Write `count` adapters on every linear layer. Return their folders, one for each adapter."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    network: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    paths = [to / f"adapter-{index}" for index in range(count)]
    for index, path in enumerate(paths):
        torch.manual_seed(index)
        for name, weight in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        network.save_pretrained(path)
    return paths
