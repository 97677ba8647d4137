"""Derive the facts of a model from its config.json. Parameters are counted from the shapes, as transformers counts
them.

A config uses its family's own field names and leaves out values that equal the family's defaults. For an unknown
family, the sizes are read under the usual names, and the number of parameters follows from the size of the weights.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from graft.api.basemodel import ModelFacts
from graft.api.patterns import CLASS_NAME
from graft.placement.blocks import FactsMissing, geometry, matrices

Config = dict[str, Any]
MOST = 2**31 - 1  # a larger number in a config is not a valid size, and is ignored
WORDS = 128  # characters of a text in the facts
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}  # bytes of a weight, by dtype


@dataclass(frozen=True)
class Family:
    """The properties of a model_type that its configs do not contain."""

    gated: bool = True  # a gate in the MLP
    norm: int = 1  # vectors of a norm: 1 for RMSNorm, 2 for LayerNorm with its bias
    norms: int = 2  # norms of a block
    head_norms: bool = False  # queries and keys are normalised, each with one vector as wide as a head
    qkv_bias: bool | str = False  # a string names the config's field that has the value
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    positions: int | None = None  # learned positions beyond the config's number; None: positions are not learned
    defaults: Config = field(default_factory=dict)


_TIED: Config = {"tie_word_embeddings": True}
_T5: Config = {"num_heads": 8, "d_kv": 64, "d_ff": 2048, "relative_attention_num_buckets": 32}
_GEMMA: Config = {"head_dim": 256} | _TIED
_GEMMA3: Config = _GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208}
_MIXTRAL: Config = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_OPT: Config = {"enable_bias": True, "do_layer_norm_before": True} | _TIED


def _llama(*, mlp_bias: bool | str = False, norms: int = 2, head_norms: bool = False, **defaults: Any) -> Family:
    return Family(
        norms=norms,
        head_norms=head_norms,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=mlp_bias,
        defaults=defaults,
    )


def _gpt(bias: bool | str, *, mlp_bias: bool | str, positions: int | None = None, **defaults: Any) -> Family:
    return Family(
        gated=False,
        norm=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
        positions=positions,
        defaults=defaults,
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama(mlp_bias="mlp_bias"),
    "granite": _llama(mlp_bias="mlp_bias"),
    "smollm3": _llama(mlp_bias="mlp_bias", **_TIED),
    "mistral": Family(defaults={"num_key_value_heads": 8}),
    "mixtral": Family(defaults=_MIXTRAL),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": _llama(head_norms=True, head_dim=128),
    "qwen3_moe": _llama(head_norms=True),
    "gemma": _llama(**_GEMMA),
    "gemma2": _llama(norms=4, **_GEMMA),
    "gemma3_text": _llama(norms=4, head_norms=True, **_GEMMA3),
    "gpt2": _gpt(True, mlp_bias=True, positions=0, n_positions=1024, **_TIED),
    "gpt_neox": _gpt("attention_bias", mlp_bias=True, attention_bias=True),
    "opt": _gpt("enable_bias", mlp_bias="enable_bias", positions=2, **_OPT),
    "falcon": _gpt("bias", mlp_bias="bias", parallel_attn=True, multi_query=True, **_TIED),
    "t5": Family(defaults=_T5 | _TIED),
    "mt5": Family(defaults=_T5 | {"feed_forward_proj": "gated-gelu"}),
}


def facts_of(config: Config, license_: str | None = None, size_bytes: int | None = None) -> ModelFacts:
    """Return the facts in a config.json.

    If it does not give the parameters, they follow from the weights' `size_bytes`.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    family = FAMILIES.get(str(text.get("model_type")))
    known = (family.defaults if family else {}) | text
    architectures = config.get("architectures")
    architecture = str(architectures[0])[:WORDS] if isinstance(architectures, list) and architectures else None
    if architecture is not None and re.fullmatch(CLASS_NAME, architecture) is None:
        architecture = None  # not a valid name of a class
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    seq2seq = bool(config.get("is_encoder_decoder"))

    def number(*names: str) -> int | None:
        return next((found for name in names if (found := _whole(known, name))), None)

    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
    experts = number("num_local_experts", "num_experts")
    inner = number("moe_intermediate_size") if experts else None
    facts = ModelFacts(
        task=_task(seq2seq, architecture, family),
        layers=number("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers"),
        encoder_layers=number("encoder_layers", "num_layers", "num_hidden_layers") if seq2seq else None,
        hidden_size=hidden,
        intermediate_size=inner
        or number("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size")
        or (4 * hidden if family and not family.gated and hidden else None),
        gated_mlp=_gated(known, family),
        heads=heads,
        kv_heads=_kv_heads(known, heads, number("num_key_value_heads", "num_kv_heads")),
        head_dim=number("head_dim", "d_kv") or ((hidden // heads or None) if hidden and heads else None),
        experts=experts,
        experts_per_token=number("num_experts_per_tok") if experts else None,
        vocab_size=number("vocab_size"),
        tied_embeddings=bool(known["tie_word_embeddings"])
        if "tie_word_embeddings" in known
        else None
        if family is None
        else False,
        architecture=architecture,
        dtype=str(dtype)[:WORDS] if dtype else None,
        # T5's positions are distances, so it has no longest sequence, even if its config names one.
        context_length=None
        if "relative_attention_num_buckets" in known
        else number("max_position_embeddings", "n_positions", "max_seq_len"),
        license=license_ and license_[:WORDS],
    )
    counted = _count(known, facts, family) if family is not None and text is config else None
    return facts.model_copy(update={"parameters": counted or _from_size(config, facts.dtype, size_bytes)})


def _whole(known: Config, name: str) -> int | None:
    """Return a number from 1 to MOST in a config, or None. The author of the model wrote the config: it may hold anything."""
    found = known.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 < found <= MOST else None


def _task(seq2seq: bool, architecture: str | None, family: Family | None) -> Literal["causal", "seq2seq"] | None:
    """Return the task. None if it is another one, or unknown (an encoder, an image model)."""
    if seq2seq:
        return "seq2seq"
    causal = family is not None or (architecture or "").endswith(("ForCausalLM", "LMHeadModel"))
    return "causal" if causal else None


def _gated(known: Config, family: Family | None) -> bool | None:
    if "feed_forward_proj" in known or known.get("model_type") in ("t5", "mt5"):
        return str(known.get("feed_forward_proj", "relu")).startswith("gated")
    return family.gated if family is not None else None


def _kv_heads(known: Config, heads: int | None, given: int | None) -> int | None:
    if known.get("model_type") == "falcon" and not known.get("new_decoder_architecture"):
        return 1 if known.get("multi_query") else heads
    return given or heads


def _count(known: Config, facts: ModelFacts, family: Family) -> int | None:
    """Return the number of weights. Shared weights count once. None if it cannot be derived."""
    uneven = known.get("mlp_only_layers") or known.get("decoder_sparse_step", 1) != 1
    if uneven or facts.heads is None or facts.intermediate_size is None:
        return None
    try:
        shape = geometry(facts.model_copy(update={"parameters": 1}))
    except FactsMissing:
        return None
    blocks, hidden = shape.layers + shape.encoder_layers, shape.hidden
    crossing = shape.layers if shape.encoder_layers else 0  # cross-attentions of the decoder

    def says(bias: bool | str) -> bool:
        return bool(known.get(bias)) if isinstance(bias, str) else bias

    total = shape.embeddings + sum(item.inputs * item.outputs * item.count for item in matrices(shape))
    if says(family.qkv_bias):
        total += blocks * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if says(family.out_bias):
        total += blocks * hidden
    if says(family.mlp_bias):
        total += blocks * ((2 if shape.gated else 1) * shape.inner + hidden)
    if family.head_norms:
        total += blocks * 2 * shape.head_dim
    if family.positions is not None and facts.context_length is not None:
        total += (facts.context_length + family.positions) * hidden
    buckets = (_whole(known, "relative_attention_num_buckets") or 0) if crossing else 0
    total += 2 * buckets * shape.heads
    total += family.norm * hidden * _norms(known, family, blocks, crossing) + _narrow(known, shape.vocab, hidden)
    return total if 0 < total < 2**53 else None  # otherwise the config is wrong: no model is that large


def _norms(known: Config, family: Family, blocks: int, crossing: int) -> int:
    """Return the number of norms, including those after the last blocks."""
    each = family.norms
    if known.get("model_type") == "falcon":
        two = _whole(known, "num_ln_in_parallel_attn") or (2 if known.get("new_decoder_architecture") else 1)
        each = two if known.get("parallel_attn") or known.get("new_decoder_architecture") else 2
    if known.get("model_type") == "opt" and not known["do_layer_norm_before"]:
        return each * blocks
    return each * blocks + crossing + (2 if crossing else 1)


def _narrow(known: Config, vocab: int, hidden: int) -> int:
    """Return the change in the count if embeddings are narrower than the blocks, with a projection on each side
    (OPT-350m)."""
    narrow = _whole(known, "word_embed_proj_dim") or hidden
    return vocab * (narrow - hidden) + 2 * narrow * hidden if narrow != hidden else 0


def _from_size(config: Config, dtype: str | None, size_bytes: int | None) -> int | None:
    """Return the number of parameters from the size of the weights, if these are not quantised."""
    width = WIDTHS.get(dtype or "")
    if size_bytes is None or width is None or "quantization_config" in config:
        return None
    return max(1, size_bytes // width)
