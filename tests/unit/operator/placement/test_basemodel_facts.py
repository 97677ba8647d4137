"""The facts of a base model from its config.json. The number of parameters equals the count by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from graft.api import BaseModel
from graft.artifacts.sources import Description
from graft.placement.facts import facts_of
from graft.reconcile.basemodel import observe
from worlds.placement import LLAMA_2

# Tiny models of every family, with every option that changes the number of weights.
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 80, "num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 80, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = SMALL | {"ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
TINY: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", GROUPED | {"head_dim": 24}),
    ("granite", GROUPED),
    ("smollm3", GROUPED | {"pad_token_id": 0}),
    ("mistral", GROUPED),
    ("mixtral", GROUPED | {"num_local_experts": 4}),
    ("phi3", GROUPED | {"pad_token_id": 0}),
    ("qwen2", GROUPED),
    ("qwen3", GROUPED),
    ("qwen3_moe", GROUPED | MOE),
    ("gemma", GROUPED),
    ("gemma2", GROUPED),
    ("gemma3_text", GROUPED),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 48}),
    ("gpt_neox", SMALL | {"intermediate_size": 80}),
    ("gpt_neox", SMALL | {"intermediate_size": 80, "attention_bias": False}),
    ("opt", OPT),
    ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("opt", OPT | {"enable_bias": False}),
    ("falcon", SMALL),
    ("falcon", SMALL | {"bias": True, "parallel_attn": False, "multi_query": False}),
    ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("t5", T5),
    ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("mt5", T5),
]


@pytest.mark.parametrize(("kind", "fields"), TINY, ids=lambda value: value if isinstance(value, str) else "")
def test_the_number_of_parameters_equals_the_count_by_transformers(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = CONFIG_MAPPING[kind](**fields)
    seq2seq = bool(config.is_encoder_decoder)
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    facts = facts_of(json.loads((tmp_path / "config.json").read_text()))
    assert facts.parameters == model.num_parameters()
    assert facts.task == ("seq2seq" if seq2seq else "causal")
    assert facts.layers == (config.num_decoder_layers if seq2seq else config.num_hidden_layers)
    assert facts.encoder_layers == (config.num_layers if seq2seq else None)


FLAN_T5_BASE = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "is_encoder_decoder": True,
    "d_model": 768,
    "d_ff": 2048,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
    "n_positions": 512,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2["7B"], 6_738_415_616),
        (LLAMA_2["13B"], 13_015_864_320),
        (LLAMA_2["70B"], 68_976_648_192),
        (FLAN_T5_BASE, 247_577_856),
    ],
    ids=["Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "flan-t5-base"],
)
def test_the_number_of_parameters_equals_the_published_number(config: dict[str, Any], parameters: int) -> None:
    assert facts_of(config).parameters == parameters


def test_the_facts_include_every_value_of_the_config() -> None:
    assert facts_of(LLAMA_2["70B"], "llama2").wire() == {
        "parameters": 68_976_648_192,
        "task": "causal",
        "layers": 80,
        "hiddenSize": 8192,
        "intermediateSize": 28672,
        "gatedMlp": True,
        "heads": 64,
        "kvHeads": 8,
        "headDim": 128,
        "vocabSize": 32000,
        "tiedEmbeddings": False,
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "contextLength": 4096,
        "license": "llama2",
    }


NOVEL = {"model_type": "novel", "architectures": ["NovelForCausalLM"], "hidden_size": 64, "torch_dtype": "bfloat16"}


def test_the_size_of_the_weights_gives_the_parameters_of_an_unknown_architecture() -> None:
    facts = facts_of(NOVEL, size_bytes=2_000_000)
    assert (facts.parameters, facts.task, facts.hidden_size) == (1_000_000, "causal", 64)
    assert facts.heads is None and facts.gated_mlp is None and facts.tied_embeddings is None


def test_unknown_facts_stay_empty() -> None:
    assert facts_of(NOVEL).parameters is None
    quantised = NOVEL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert facts_of(quantised, size_bytes=2_000_000).parameters is None
    assert facts_of({}).wire() == {}


def test_a_multimodal_model_has_the_facts_of_its_language_model() -> None:
    gemma = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        "torch_dtype": "bfloat16",
    }
    facts = facts_of(gemma, size_bytes=8_600_000_000)
    # The weights include the vision model, so only their size gives the number of parameters.
    assert (facts.parameters, facts.layers, facts.hidden_size) == (4_300_000_000, 34, 2560)
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.vocab_size) == (8, 4, 256, 262208)


def resource(task: str, facts: dict[str, Any] | None = None) -> BaseModel:
    spec = {"source": "s3://models/flan", "task": task} | ({"facts": facts} if facts else {})
    return BaseModel.model_validate({"metadata": {"name": "flan", "generation": 1}, "spec": spec})


def test_a_task_that_contradicts_the_config_is_refused_with_the_remedy() -> None:
    found = Description("sha256:0", None, FLAN_T5_BASE, 990_000_000)
    status, [ready] = observe(resource("causal"), found)
    assert (status.stage, ready.status, ready.type) == ("Unavailable", "False", "Ready")
    assert ready.message == (
        "spec.task is causal, but config.json describes a seq2seq model (T5ForConditionalGeneration). "
        "Set spec.task: seq2seq"
    )
    status, [ready] = observe(resource("seq2seq"), found)
    assert (status.stage, ready.status) == ("Ready", "True")
    assert status.facts is not None and status.facts.parameters == 247_577_856
    assert status.facts.context_length is None  # T5 has no maximum sequence length


def test_facts_in_the_spec_override_the_config() -> None:
    found = Description("sha256:0", None, FLAN_T5_BASE, 990_000_000)
    status, [ready] = observe(resource("causal", {"task": "causal", "layers": 3}), found)
    assert ready.status == "True" and status.facts is not None
    assert (status.facts.task, status.facts.layers, status.facts.hidden_size) == ("causal", 3, 768)
