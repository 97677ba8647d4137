"""Imported versions: a version that was tuned elsewhere is published if it can be served and fits the base model.

Otherwise the message says why it is refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.progress import EXIT_CODES, Reason, Termination
from graft_trainer.run.failures import Failure
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from worlds.composition import BASE, deltas, download, load_base, make, make_adapter, tensors, version_file
from worlds.hub import COMMIT, Hub
from worlds.trainer import MemoryStore, make_qwen

SOURCE = "s3://elsewhere/adapters/theirs/"


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "a", 1)


@pytest.fixture
def theirs(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    return store


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> None:
    found = tensors(folder)
    spoil(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "adapter_model.safetensors")


def imported(root: Path, store: MemoryStore, folder: Path, **changes: Any) -> Any:
    store.add_folder("adapters/theirs/", folder)
    return make(root / "run", store, version_file(source=SOURCE, **changes))


def refused(root: Path, store: MemoryStore, folder: Path, **changes: Any) -> str:
    with pytest.raises(Failure) as caught:
        imported(root, store, folder, **changes)
    assert caught.value.reason == Reason.ADAPTER_INVALID, caught.value.message
    assert not [key for key in store.kept if key.startswith("team-a/adapters/both/")], (
        "a refused version must not be published"
    )
    return f"{caught.value.message} {caught.value.remedy}"


def test_an_adapter_is_published_with_a_config_of_known_keys(
    base: Path, theirs: Path, store: MemoryStore, tmp_path: Path
) -> None:
    edit(theirs, base_model_name_or_path="/home/someone/llama", surprise={"key": 1}, inference_mode=False)
    manifest = imported(tmp_path, store, theirs)
    assert (manifest.imported_from, manifest.parents) == (SOURCE, [])
    assert manifest.source_digest.startswith("sha256:")
    assert (manifest.rank, manifest.target_modules) == (4, ["q_proj", "v_proj"])
    assert manifest.hyperparameters == {"rank": 4, "alpha": 8.0}
    assert manifest.base_model.uri == BASE

    folder = download(store, tmp_path / "result")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        "surprise" not in config and config["base_model_name_or_path"] == "./tiny" and config["inference_mode"] is True
    )
    assert (folder / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    found, expected = deltas(base, folder), deltas(base, theirs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map is set, but code in adapters is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but method lora expects LORA"),
        ({"use_dora": True}, "use_dora is set, but DoRA is not supported"),
        ({"bias": "all"}, "bias is 'all', but only none can be served"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside the low-rank update"),
        ({"init_lora_weights": "pissa_niter_16"}, "belongs to another base model"),
        ({"r": 100_000}, "a rank must be an integer from 1 to 512"),
        ({"r": 8}, "on tiny it must have shape [8, 64]"),
        ({"target_modules": []}, "names no modules"),
        ({"target_modules": ["query_key_value"]}, "does not fit the base model tiny"),
        ({"target_modules": ["q_proj", "k_proj"]}, "has 4 tensors that do not belong to its config on tiny"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    changes: dict[str, Any], words: str, theirs: Path, store: MemoryStore, tmp_path: Path
) -> None:
    edit(theirs, **changes)
    assert words in refused(tmp_path, store, theirs)


def nan(found: dict[str, torch.Tensor]) -> None:
    next(iter(found.values()))[0, 0] = float("inf")


def stranger(found: dict[str, torch.Tensor]) -> None:
    found["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def whole_numbers(found: dict[str, torch.Tensor]) -> None:
    name = next(iter(found))
    found[name] = found[name].to(torch.int32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan, "holds NaN or infinity: its training diverged"),
        (stranger, "the vocabulary was resized before the adapter was tuned"),
        (whole_numbers, "has type I32"),
    ],
)
def test_invalid_weights_are_refused(
    spoil: Callable[[dict[str, torch.Tensor]], None], words: str, theirs: Path, store: MemoryStore, tmp_path: Path
) -> None:
    change(theirs, spoil)
    assert words in refused(tmp_path, store, theirs)


def test_pickled_and_truncated_weights_are_refused(theirs: Path, store: MemoryStore, tmp_path: Path) -> None:
    weights = theirs / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a complete safetensors file" in refused(tmp_path, store, theirs)
    store.kept.pop("adapters/theirs/adapter_model.safetensors")
    weights.rename(theirs / "adapter_model.bin")
    text = refused(tmp_path, store, theirs)
    assert "only adapter_model.bin" in text and "never loads pickled weights" in text


def test_an_adapter_of_another_base_model_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    theirs = make_adapter(tmp_path / "wider", tmp_path / "theirs", 1)
    text = refused(tmp_path, store, theirs)
    assert "has shape [4, 32], but on tiny it must have shape [4, 64]" in text and "spec.baseModel" in text


def test_a_folder_that_looks_like_a_full_model_names_the_method_to_set(
    theirs: Path, store: MemoryStore, tmp_path: Path
) -> None:
    (theirs / "adapter_config.json").rename(theirs / "config.json")
    assert "set spec.method to full" in refused(tmp_path, store, theirs)


def test_a_tuned_prompt_is_imported(base: Path, store: MemoryStore, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = get_peft_model(load_base(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    model.save_pretrained(tmp_path / "theirs")
    manifest = imported(tmp_path, store, tmp_path / "theirs", method="promptTuning")
    assert manifest.hyperparameters == {"virtualTokens": 6}
    assert load_file(download(store, tmp_path / "result") / "adapter_model.safetensors")["prompt_embeddings"].shape == (
        6,
        64,
    )
    edit(tmp_path / "theirs", num_virtual_tokens=7)
    store.kept = {key: data for key, data in store.kept.items() if key.startswith("models/")}
    assert "prompt_embeddings has shape [6, 64], but on tiny it must have shape [7, 64]" in refused(
        tmp_path, store, tmp_path / "theirs", method="promptTuning"
    )


def tuned_model(base: Path, folder: Path) -> Path:
    """Save a full model like the base model, with every weight a little different. Return its folder."""
    model = load_base(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder)
    for path in base.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_full_model_is_imported(base: Path, store: MemoryStore, tmp_path: Path) -> None:
    theirs = tuned_model(base, tmp_path / "theirs")
    (theirs / "README.md").write_text("mine")
    manifest = imported(tmp_path, store, theirs, method="full")
    assert (manifest.method, manifest.imported_from) == ("full", SOURCE)
    names = {item.name for item in manifest.files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    card = store.kept["team-a/adapters/both/1.0.0/README.md"].decode()
    assert "mine" not in card and f"imported it from `{SOURCE}`" in card


def test_a_full_model_of_other_shapes_or_another_type_is_refused(
    base: Path, store: MemoryStore, tmp_path: Path
) -> None:
    theirs = tuned_model(base, tmp_path / "theirs")
    weights = load_file(theirs / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing for tiny" in refused(tmp_path, store, theirs, method="full")
    save_file(
        weights | {"model.layers.1.mlp.up_proj.weight": lost[:100].contiguous()},
        theirs / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "1 weights are mismatched for tiny" in refused(tmp_path, store, theirs, method="full")
    store.kept = {key: data for key, data in store.kept.items() if key.startswith("models/")}
    qwen = make_qwen(tmp_path / "qwen")
    assert "is a qwen2 model, but tiny is a llama model" in refused(tmp_path, store, qwen, method="full")


@pytest.fixture
def published_on_hub(hub: Hub, theirs: Path) -> Iterator[Hub]:
    hub.files = {f"org/model/{path.name}": path.read_bytes() for path in theirs.iterdir()}
    yield hub


def test_an_adapter_of_the_hub_is_pinned_to_its_commit(
    published_on_hub: Hub, store: MemoryStore, tmp_path: Path
) -> None:
    file = version_file(source="hf://org/model@main", hfEndpoint=published_on_hub.endpoint)
    manifest = make(tmp_path / "run", store, file)
    assert manifest.imported_from == f"hf://org/model@{COMMIT}" and manifest.source_digest is None
    assert manifest.rank == 4


def test_a_repository_with_only_pickled_weights_is_refused(
    published_on_hub: Hub, store: MemoryStore, tmp_path: Path
) -> None:
    files = published_on_hub.files
    files["org/model/adapter_model.bin"] = files.pop("org/model/adapter_model.safetensors")
    file = version_file(source="hf://org/model@main", hfEndpoint=published_on_hub.endpoint)
    with pytest.raises(
        Failure, match=r"there is no adapter_model.safetensors at hf://org/model@main, only adapter_model.bin"
    ):
        make(tmp_path / "run", store, file)


def test_a_hub_that_does_not_answer_is_storage_unavailable(store: MemoryStore, tmp_path: Path) -> None:
    file = version_file(source="hf://org/model@main", hfEndpoint="http://127.0.0.1:9")
    with pytest.raises(Failure) as caught:
        make(tmp_path / "run", store, file)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_the_command_writes_its_failure_for_the_operator(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "job.json").write_text("{}")
    environment = dict(os.environ) | {
        "GRAFT_JOB_FILE": str(tmp_path / "job.json"),
        "GRAFT_WORK_DIR": str(tmp_path / "work"),
        "GRAFT_TERMINATION_FILE": str(tmp_path / "termination"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "graft_trainer", "import"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_CODES[Reason.INTERNAL_ERROR], done.stderr
    said = Termination.model_validate_json((tmp_path / "termination").read_text())
    assert said.reason == Reason.INTERNAL_ERROR and "job: Field required" in said.message
