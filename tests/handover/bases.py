"""Tiny base models that vLLM can build, with random weights: attention heads have 64 dimensions, its kernels need 32.

The multimodal one has everything that vLLM asks such a model for: a processor, its token, and the tensors' names of the Hub.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from worlds.engine import make_network
from worlds.engine import make_tokenizer as make_character_tokenizer
from worlds.trainer import UNMARKED, make_tokenizer

END = "<|end|>"  # ends a turn of the chat template. The model's own end is </s>
IMAGE = "<image>"
TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def make_llama(folder: Path) -> Path:
    """Save a Llama whose tokens are single characters."""
    make_character_tokenizer(folder)
    return make_network(folder, LlamaConfig, hidden_size=256, intermediate_size=256, num_attention_heads=4)


def make_chat_tokenizer(*special: str) -> Any:
    """Return a tokenizer whose chat template ends turns with END. It adds its first token to a text, as many do."""
    tokenizer = make_tokenizer(UNMARKED.replace("eos_token", f"'{END}'"))
    tokenizer.add_special_tokens({"additional_special_tokens": [END, *special]}, replace_extra_special_tokens=False)
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_llava(folder: Path) -> Path:
    """Save a LLaVA: a multimodal wrapper around a Llama."""
    torch.manual_seed(3)
    tokenizer = make_chat_tokenizer(IMAGE)
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | {"model_type": "clip_vision_model", "projection_dim": 64},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_as_on_the_hub(folder, "vision_tower.", "vision_tower.vision_model.")
    picture = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    _write(folder, "preprocessor_config.json", image_processor_type="CLIPImageProcessor", **picture)
    processor = {"patch_size": 8, "vision_feature_select_strategy": "default", "image_token": IMAGE}
    _write(folder, "processor_config.json", processor_class="LlavaProcessor", **processor)
    return folder


def _name_as_on_the_hub(folder: Path, new: str, old: str) -> None:
    """Give the tensors of a part their older names, which published models have and vLLM looks for."""
    path = folder / "model.safetensors"
    tensors = {name.replace(new, old): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _write(folder: Path, name: str, **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))
