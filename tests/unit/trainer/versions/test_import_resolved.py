"""What people's adapters say by patterns, layers and copies of embeddings: published with plain lists, and loaded by the
agent and the engine with the same effect. Or refused with the true cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.progress import Reason
from graft_server.agent.storage.adapterconfig import reduced_config
from graft_server.engine.adapters import Limits, LoraWeights, read_adapter
from graft_server.engine.model import adaptable_modules
from graft_trainer.run.failures import Failure
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from worlds.architectures import MULTIMODAL, save_model
from worlds.composition import deltas, download, load_base, make, make_adapter, version_file
from worlds.trainer import MemoryStore

SOURCE = "s3://elsewhere/adapters/theirs/"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    return store


def imported(root: Path, store: MemoryStore, folder: Path) -> Path:
    """Import the adapter. Return the published files, which the agent accepts."""
    store.add_folder("adapters/theirs/", folder)
    manifest = make(root / "run", store, version_file(source=SOURCE))
    result = download(store, root / "result")
    reduced_config((result / CONFIG).read_bytes(), manifest.rank, 64)
    return result


def refused(root: Path, store: MemoryStore, folder: Path) -> tuple[str, str]:
    store.add_folder("adapters/theirs/", folder)
    with pytest.raises(Failure) as caught:
        make(root / "run", store, version_file(source=SOURCE))
    assert caught.value.reason == Reason.ADAPTER_INVALID
    return caught.value.message, caught.value.remedy


def engine_deltas(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the change of each weight as the CPU engine computes it."""
    network = load_base(base)
    weights = read_adapter(str(folder), Limits(adaptable_modules(network), 64, 64, 100))
    assert isinstance(weights, LoraWeights)
    return {f"{name}.weight": pair.b @ pair.a for name, pair in weights.pairs.items()}


@pytest.mark.parametrize(
    ("config", "resolved"),
    [
        ({"target_modules": r".*layers\.1\..*\.(q|v)_proj"}, {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]}),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}, {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]}),
        ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj", "o_proj"]}, {"target_modules": ["down_proj", "gate_proj", "q_proj", "up_proj"]}),
        ({"rank_pattern": {"^model.layers.[0].*q_proj": 6}, "alpha_pattern": {r"v_pro\w": 32}}, {"rank_pattern": {"model.layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 32}}),
        ({"target_modules": ["q_proj", "v_proj", "query_key_value"]}, {"target_modules": ["q_proj", "v_proj"]}),
    ],
)  # fmt: skip
def test_patterns_are_published_as_plain_lists_with_the_same_effect(
    config: dict[str, Any], resolved: dict[str, Any], base: Path, store: MemoryStore, tmp_path: Path
) -> None:
    theirs = make_adapter(base, tmp_path / "theirs", 1, **config)
    path = theirs / CONFIG
    # save_pretrained() itself replaces some patterns by what they match.
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if value != "all-linear"
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | kept))
    result = imported(tmp_path, store, theirs)
    published = json.loads((result / CONFIG).read_text())
    assert {key: published.get(key) for key in resolved} == resolved
    assert not {"exclude_modules", "layers_to_transform", "layers_pattern"} & published.keys()
    wanted, served = deltas(base, theirs), engine_deltas(base, result)
    assert wanted.keys() == served.keys() == deltas(base, result).keys()
    for name, change in wanted.items():
        torch.testing.assert_close(served[name], change, atol=1e-4, rtol=1e-3)


def test_a_copy_of_the_embeddings_beside_their_update_is_left_out(
    base: Path, store: MemoryStore, tmp_path: Path
) -> None:
    theirs = make_adapter(base, tmp_path / "theirs", 1, target_modules=["embed_tokens", "q_proj"])
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert copy in load_file(theirs / WEIGHTS)  # peft writes it by itself
    result = imported(tmp_path, store, theirs)
    found, before = load_file(result / WEIGHTS), load_file(theirs / WEIGHTS)
    assert found.keys() == before.keys() - {copy}
    assert all(torch.equal(found[name], before[name]) for name in found)


def test_whole_embeddings_and_a_resized_vocabulary_are_refused_as_what_they_are(
    base: Path, store: MemoryStore, tmp_path: Path
) -> None:
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    message, remedy = refused(tmp_path, store, tmp_path / "whole")
    assert "the whole weights of lm_head beside its low-rank update" in message or "model.embed_tokens" in message
    assert "save_embedding_layers=False" in remedy

    wider = load_base(base)
    wider.resize_token_embeddings(wider.get_input_embeddings().num_embeddings + 8)
    model = get_peft_model(wider, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    message, remedy = refused(tmp_path, store, tmp_path / "resized")
    assert "the vocabulary was resized before the adapter was tuned" in message
    assert "create a BaseModel for it" in remedy


def test_a_module_that_the_base_model_lacks_is_named_before_anything_that_is_missing(
    base: Path, store: MemoryStore, tmp_path: Path
) -> None:
    theirs = make_adapter(base, tmp_path / "theirs", 1)
    renamed = {
        name.replace("q_proj", "query_key_value"): tensor for name, tensor in load_file(theirs / WEIGHTS).items()
    }
    save_file(renamed, theirs / WEIGHTS)
    message, remedy = refused(tmp_path, store, theirs)
    assert (
        "updates 2 modules that tiny does not have (query_key_value), the first is model.layers.0.self_attn.query_key"
        in message
    )
    assert remedy.startswith("Set spec.baseModel to the model on which the adapter was tuned.")
    (tmp_path / "less").mkdir()
    less = make_adapter(base, tmp_path / "less/theirs", 1)
    some = dict(list(load_file(less / WEIGHTS).items())[:4])
    save_file(some, less / WEIGHTS)
    message, remedy = refused(tmp_path / "less", store, less)
    assert "lacks 4 tensors that its adapter_config.json names" in message and "Upload the complete adapter" in remedy


@pytest.mark.parametrize("old", ["model.layers.", "language_model.model.layers."])
def test_adapters_of_a_multimodal_model_get_the_names_that_servers_look_for(old: str, tmp_path: Path) -> None:
    folder = save_model(MULTIMODAL["qwen3_5"], tmp_path / "base")
    store = MemoryStore()
    store.add_folder("models/tiny/", folder)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    targets = r".*language_model.*\.(q_proj|up_proj)"
    model = get_peft_model(whole, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs")
    new = "model.language_model.layers."
    tensors = {name.replace(new, old): t for name, t in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    config |= {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {f"{old}0.mlp.up_proj": 64}}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    result = imported(tmp_path, store, tmp_path / "theirs")
    assert all(f".{new}" in name for name in load_file(result / WEIGHTS))
    published = json.loads((result / CONFIG).read_text())
    assert published["alpha_pattern"] == {f"{new}0.mlp.up_proj": 64}
