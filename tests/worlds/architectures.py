"""Tiny models of the families that are more than a stack of attention and MLP: multimodal, mixtures, state spaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
}  # fmt: skip


def qwen3_5() -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = SMALL | LINEAR_ATTENTION | {"head_dim": 8, "initializer_range": 0.3}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=QWEN_TOWER))


def llama4() -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = SMALL | {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    tower = {"vision_output_dim": 16, "intermediate_size": 64, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=TOWER | tower))


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SMALL | {"head_dim": 8, "sliding_window": 16, "initializer_range": 0.3}
    config = Gemma3Config(
        text_config=text, vision_config=TOWER | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
        image_token_id=317, boi_token_index=318, eoi_token_index=319,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
    config = LlavaConfig(text_config=SMALL | {"model_type": "llama"}, vision_config=tower, image_token_id=319)
    return LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = SMALL | {"model_type": "mistral", "head_dim": 8}
    config = Mistral3Config(
        text_config=text, vision_config=TOWER | {"model_type": "pixtral", "head_dim": 8}, image_token_id=319
    )
    return Mistral3ForConditionalGeneration(config)


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tower = QWEN_TOWER | {"deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=SMALL | {"head_dim": 8}, vision_config=tower)
    return Qwen3VLForConditionalGeneration(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **sizes))


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4))


def bamba() -> Any:
    """A hybrid: one layer of attention, one state-space mixer."""
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(**SMALL, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    return BambaForCausalLM(config)


MULTIMODAL: dict[str, Callable[[], Any]] = {
    "qwen3_5": qwen3_5, "llama4": llama4, "gemma3": gemma3, "llava": llava, "mistral3": mistral3, "qwen3_vl": qwen3_vl,
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "mamba": mamba, "bamba": bamba}


def save_model(build: Callable[[], Any], folder: Path) -> Path:
    """Save a model with random weights and a byte tokenizer, in the layout of the Hub."""
    import torch

    from worlds.trainer import make_tokenizer

    torch.manual_seed(5)
    build().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
