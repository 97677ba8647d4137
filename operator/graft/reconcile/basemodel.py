"""A BaseModel: look at its source, pin it, read its facts."""

import os
from pathlib import Path
from typing import Any

from graft.api import BaseModel
from graft.api.basemodel import BaseModelStatus, ModelFacts
from graft.api.meta import Condition
from graft.artifacts import sources
from graft.contracts import HF_TOKEN_FILE
from graft.reconcile.context import WAITING, Context
from graft.status import condition, find

KIND = "BaseModel"
RECHECK = 600.0  # seconds between looks at a source that is fine


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """One look at one base model; the seconds until the next look."""
    raw = await ctx.kube.get(KIND, None, name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        return None
    model = BaseModel.model_validate(raw)
    found = await _describe(ctx, model)
    status, observed = observe(model, found)
    await ctx.write_status(raw, status, observed)
    ready = find(observed, "Ready")
    return RECHECK if ready is not None and ready.status == "True" else WAITING


async def _describe(ctx: Context, model: BaseModel) -> sources.Description | sources.SourceError | None:
    if model.spec.source.startswith("pvc://"):
        return None
    try:
        token = await ctx.blocking(_token)
        return await ctx.blocking(
            sources.describe, model.spec.source, ctx.store, ctx.settings.huggingface_endpoint, token
        )
    except sources.SourceError as error:
        return error


def _token() -> str | None:
    path = Path(os.environ.get("GRAFT_HF_TOKEN_FILE", HF_TOKEN_FILE))
    return path.read_text().strip() if path.exists() else None


def facts_of(config: dict[str, Any], license_: str | None) -> ModelFacts:
    """The facts that a transformers config.json tells (PURE). Parameters are counted for Llama-like decoders only."""

    def number(*names: str) -> int | None:
        return next((int(config[key]) for key in names if isinstance(config.get(key), int) and config[key] > 0), None)

    hidden, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer", "num_layers")
    architectures = config.get("architectures") or []
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        parameters=_llama_parameters(config),
        layers=layers,
        hidden_size=hidden,
        vocab_size=number("vocab_size"),
        architecture=str(architectures[0]) if architectures else None,
        dtype=str(dtype) if dtype else None,
        context_length=number("max_position_embeddings", "n_positions", "max_seq_len"),
        license=license_,
    )


def _llama_parameters(config: dict[str, Any]) -> int | None:
    """Weights of a decoder with gated MLP and grouped-query attention: embeddings, per layer q k v o, gate up down, two norms."""
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
    except (KeyError, TypeError, ValueError):
        return None
    if config.get("model_type") not in {"llama", "mistral", "qwen2", "qwen3"}:
        return None
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def observe(
    model: BaseModel, found: sources.Description | sources.SourceError | None
) -> tuple[BaseModelStatus, list[Condition]]:
    """The status of a base model (PURE)."""
    given = model.spec.facts.wire() if model.spec.facts else {}
    before = model.status
    if found is None:
        status = before.model_copy(update={"stage": "Ready", "facts": model.spec.facts})
        return status, [
            condition(
                KIND, "Ready", "True", "NotInspected", f"{model.spec.source} is looked at by the pods that mount it"
            )
        ]
    if isinstance(found, sources.SourceError):
        ready = find(before.conditions, "Ready")
        current = ready is not None and ready.observed_generation == model.metadata.generation
        if found.transient and current and ready is not None and ready.status == "True":
            # A source that does not answer now was fine before, and is pinned: what runs goes on.
            return before, [ready]
        reason = "SourceUnavailable" if found.transient else "SourceInvalid"
        return before.model_copy(update={"stage": "Unavailable"}), [
            condition(KIND, "Ready", "False", reason, str(found))
        ]
    facts = ModelFacts.model_validate(facts_of(found.config, found.license).wire() | given)
    status = before.model_copy(
        update={
            "stage": "Ready",
            "revision": found.revision,
            "digest": found.digest,
            "size_bytes": found.size_bytes,
            "facts": facts,
        }
    )
    pinned = found.revision or found.digest or ""
    changed = before.digest is not None and found.digest != before.digest and found.revision is None
    reason = "SourceChanged" if changed else "Resolved"
    ready = find(before.conditions, "Ready")
    if not changed and ready is not None and ready.reason == "SourceChanged" and before.digest == found.digest:
        reason = "SourceChanged"
    what = f"{model.spec.source} is {pinned}"
    text = f"{what}; its files changed since it was first resolved, new jobs and pods use them as they are now"
    return status, [condition(KIND, "Ready", "True", reason, text if reason == "SourceChanged" else what)]
