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


def mllama() -> Any:
    """Llama 3.2 Vision: its second layer attends to the image alone, and text passes it by."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = SMALL | {"num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0, "initializer_range": 0.3}
    tower = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=tower, image_token_index=319))


def gemma3n_text() -> Any:
    """The language model of Gemma 3n alone. The whole model needs timm."""
    import torch
    from transformers import Gemma3nForCausalLM

    model = Gemma3nForCausalLM(gemma3n_config().text_config)
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):  # zeros before training: what it scales would get no gradient
            torch.nn.init.ones_(parameter)
    return model


def gemma3n_config() -> Any:
    from transformers import Gemma3nConfig

    text = SMALL | {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    }  # fmt: skip
    return Gemma3nConfig(text_config=text)


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
    "mllama": mllama,
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral, "qwen2_moe": qwen2_moe, "mamba": mamba, "bamba": bamba, "gemma3n_text": gemma3n_text,
}  # fmt: skip
EXPERTS = ["down_proj", "gate_up_proj"]
LATENT: dict[str, Any] = {  # attention of DeepSeek
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "head_dim": 4,
}  # fmt: skip
# Mixtures by model_type: the fields of a tiny config, and what the stacked experts are called.
MIXTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mixtral": ({"num_local_experts": 4}, EXPERTS),
    "qwen2_moe": ({"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, EXPERTS),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}, EXPERTS),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}, EXPERTS),
    "deepseek_v3": (
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1} | LATENT,
        EXPERTS,
    ),
    "olmoe": ({"num_experts": 4}, EXPERTS),
    "granitemoe": ({"num_local_experts": 4}, EXPERTS),
    "glm4_moe": ({"n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "first_k_dense_replace": 1}, EXPERTS),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_intermediate_size": 16}, EXPERTS),
    "hunyuan_v1_moe": ({"num_experts": 4, "head_dim": 8}, EXPERTS),
    "longcat_flash": (
        {"n_routed_experts": 4, "num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16} | LATENT, EXPERTS,
    ),
    "jetmoe": ({"num_local_experts": 4, "kv_channels": 8}, ["input_linear", "output_linear"]),
    "dbrx": (
        {
            "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        ["v1", "w1", "w2"],
    ),
}  # fmt: skip


def save_model(build: Callable[[], Any], folder: Path) -> Path:
    """Save a model with random weights and a byte tokenizer, in the layout of the Hub."""
    import torch

    from worlds.trainer import make_tokenizer

    torch.manual_seed(5)
    build().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
