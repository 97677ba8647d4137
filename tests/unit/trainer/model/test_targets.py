"""The presets of target modules on common architectures, as transformers builds them."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graft.api.recipe import Lora
from graft_trainer.model.model import embeddings_of, has_liger, projections_of
from graft_trainer.model.targets import target_modules
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
T5_ATTENTION = ["k", "o", "q", "v"]
# model_type -> config, and the modules of attention, attention+mlp, all-linear and the embeddings
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str], list[str], list[str], list[str]]] = {
    "llama": (SMALL, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "qwen2": (SMALL, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "qwen3": (SMALL | {"head_dim": 8}, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "mistral": (SMALL, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "gemma": (SMALL | {"head_dim": 8}, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "gemma3_text": (SMALL | {"head_dim": 8}, ATTENTION, ATTENTION + MLP, ATTENTION + MLP, ["embed_tokens"]),
    "gpt2": (
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        ["attn.c_proj", "c_attn"], ["c_attn", "c_fc", "c_proj"], ["c_attn", "c_fc", "c_proj"], ["wte"],
    ),
    "opt": (
        {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16},
        ["k_proj", "out_proj", "q_proj", "v_proj"],
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        ["fc1", "fc2", "k_proj", "out_proj", "project_in", "project_out", "q_proj", "v_proj"],
        ["embed_tokens"],
    ),
    "t5": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        T5_ATTENTION, [*T5_ATTENTION, "wi", "wo"], [*T5_ATTENTION, "wi", "wo"], ["embed_tokens"],
    ),
    "bart": (
        {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2,
         "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32},
        ["k_proj", "out_proj", "q_proj", "v_proj"],
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        ["embed_tokens"],
    ),
}  # fmt: skip
SEQ2SEQ = {"t5", "bart"}


def built(kind: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind][0])
    return (AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_presets_name_the_modules_of_the_architecture(kind: str) -> None:
    _, attention, mlp, linear, embeddings = ARCHITECTURES[kind]
    model = built(kind)
    found = {
        preset: target_modules(Lora(target_modules=preset), projections_of(model), embeddings_of(model))
        for preset in ("attention", "attention+mlp", "all-linear", "all-linear+embeddings")
    }
    assert found == {
        "attention": sorted(attention),
        "attention+mlp": sorted(mlp),
        "all-linear": sorted(linear),
        "all-linear+embeddings": sorted(linear + embeddings),
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_target_gets_a_gradient_and_the_head_and_positions_are_no_targets(kind: str) -> None:
    model = built(kind)
    lora = Lora(target_modules="all-linear+embeddings", rank=4)
    targets = target_modules(lora, projections_of(model), embeddings_of(model))
    task = TaskType.SEQ_2_SEQ_LM if kind in SEQ2SEQ else TaskType.CAUSAL_LM
    tuned = get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules=targets))
    ids = torch.randint(4, 64, (2, 12))
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    # The matrices that start at zero get the first gradient: B, or A for embeddings.
    # A module that the forward pass does not use gets no gradient.
    first = {name: p for name, p in trained.items() if ".lora_B." in name or ".lora_embedding_A." in name}
    without = [name for name, parameter in first.items() if parameter.grad is None or not parameter.grad.any()]
    assert first and without == []
    assert not any(part in name for name in trained for part in ("lm_head", "wpe", "position"))


def test_fused_kernels_are_unavailable_if_triton_does_not_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llama = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert not has_liger(llama) and "Triton does not work here" in caplog.text
    caplog.clear()
    assert not has_liger(SimpleNamespace(**vars(llama), accepts_loss_kwargs=False)) and not caplog.text
