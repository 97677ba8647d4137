"""Models with random weights in the shapes that the benchmarks need. The benchmarks measure their cost, not their
answers."""

import json
import shutil
from pathlib import Path

from benchmarks.train.recipe import MODEL

# hidden size, intermediate size, layers, attention heads, key-value heads
SMALL = (512, 1408, 6, 8, 8)  # 20 million parameters: a checkpoint of full tuning has 240 MB
SEVEN = (4096, 11008, 32, 32, 32)  # Llama 2 7B


def make(folder: Path, shape: tuple[int, int, int, int, int], *, dtype: str = "float32") -> Path:
    """Write a Llama with random weights and the quickstart's tokenizer. The 7B shape has Llama 2's vocabulary and
    context, so that the head has its usual share of the work."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, shared = shape
    config = LlamaConfig.from_dict(
        json.loads((MODEL / "config.json").read_text())
        | {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "head_dim": hidden // heads,
            "dtype": dtype,
        }
    )
    if shape == SEVEN:
        config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings = 32000, 4096, False
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
    finally:
        torch.set_default_dtype(previous)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return folder
