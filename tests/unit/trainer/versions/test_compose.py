"""Composed versions: their weights follow from the parents, the parents' weights and the method."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.artifacts.manifest import ManifestBaseModel
from graft.contracts.progress import Reason
from graft_server.agent.storage.adapterconfig import reduced_config as agent_config
from graft_server.agent.storage.weights import check_weights
from graft_trainer.model.shapes import base_of_shapes
from graft_trainer.run.failures import Failure, explain
from peft import PeftModel
from worlds.composition import (
    BASE,
    composed,
    deltas,
    download,
    load_base,
    logits,
    make,
    make_adapter,
    publish_adapter,
    tensors,
    version_file,
)
from worlds.trainer import MemoryStore, make_base, make_t5


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": make_adapter(base, root / "a", 1),
        "b": make_adapter(base, root / "b", 2),
        "wide": make_adapter(base, root / "wide", 3, rank=8, target_modules=["q_proj", "down_proj"], use_rslora=True),
        "late": make_adapter(base, root / "late", 4, target_modules=r".*layers\.1\..*(k|v)_proj"),
        "early": make_adapter(base, root / "early", 5, target_modules=["o_proj"], layers_to_transform=[0]),
    }


@pytest.fixture
def store(base: Path) -> MemoryStore:
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    return store


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def total(*parts: tuple[float, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for weight, part in parts:
        for name, delta in part.items():
            result[name] = result.get(name, torch.zeros_like(delta)) + weight * delta
    return result


def test_cat_is_the_exact_weighted_sum_for_all_ranks_modules_and_scales(
    base: Path, adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [
        publish_adapter(store, adapters["wide"], "1.0.0", weight=0.5),
        publish_adapter(store, adapters["late"], "2.0.0", weight=-1.5),
        publish_adapter(store, adapters["early"], "2.1.0", weight=2.0),
        publish_adapter(store, adapters["a"], "3.0.0"),
    ]
    manifest = composed(tmp_path / "run", store, parents)
    keys = ("wide", "late", "early", "a")
    expected = total(*((one.weight, deltas(base, adapters[key])) for one, key in zip(parents, keys, strict=True)))
    folder = download(store, tmp_path / "result")
    close(deltas(base, folder), expected)

    assert (manifest.method, manifest.rank, manifest.base_model.uri) == ("lora", 8 + 4 + 4 + 4, BASE)
    assert [(one.adapter, one.version, one.digest, one.weight) for one in manifest.parents] == [
        ("part", one.version, one.digest, one.weight) for one in parents
    ]
    assert manifest.composition == {"method": "cat", "majoritySign": "total", "seed": 0, "into": "adapter"}
    assert manifest.target_modules == ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {item.name for item in manifest.files} == adapter | tokenizer | {"README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./tiny" and str(tmp_path) not in json.dumps(config)
    # The agent accepts it as well.
    assert agent_config((folder / "adapter_config.json").read_bytes(), manifest.rank, 64)["r"] == 20
    check_weights(folder / "adapter_model.safetensors", 64)


def test_linear_of_a_version_with_itself_is_its_scaled_update(
    base: Path, adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    # For equal A and B the factor is (sqrt(w1) + sqrt(w2))^2. For the weights 1 and 4 this is 9.
    parents = [
        publish_adapter(store, adapters["a"], "1.0.0", weight=1.0),
        publish_adapter(store, adapters["a"], "1.0.1", weight=4.0),
    ]
    manifest = composed(tmp_path / "run", store, parents, method="linear")
    close(deltas(base, download(store, tmp_path / "result")), total((9.0, deltas(base, adapters["a"]))))
    assert manifest.rank == 4


def test_svd_with_full_rank_is_the_sum_and_with_a_lower_rank_its_best_approximation(
    base: Path, adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [publish_adapter(store, adapters["a"], "1.0.0", 0.7), publish_adapter(store, adapters["b"], "1.0.1", 0.3)]
    expected = total((0.7, deltas(base, adapters["a"])), (0.3, deltas(base, adapters["b"])))
    assert composed(tmp_path / "run", store, parents, method="svd", svdRank=8).rank == 8
    close(deltas(base, download(store, tmp_path / "result")), expected)

    file = version_file(
        "2.0.0",
        composition={"parents": [one.model_dump() for one in parents], "method": "svd", "svdRank": 2},
    )
    assert make(tmp_path / "run2", store, file).rank == 2
    found = deltas(base, download(store, tmp_path / "low", version="2.0.0"))
    for name, whole in expected.items():
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(found[name], u[:, :2] @ torch.diag(s[:2]) @ vh[:2], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["ties", "tiesSvd", "dareLinear", "dareLinearSvd", "dareTies", "dareTiesSvd"])
def test_sparse_methods_equal_those_of_peft_and_are_reproducible(
    method: str, base: Path, adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [publish_adapter(store, adapters["a"], "1.0.0", 0.6), publish_adapter(store, adapters["b"], "1.0.1", 0.4)]
    arguments: dict[str, Any] = {"method": method, "density": 0.5, "seed": 7}
    composed(tmp_path / "run", store, parents, **arguments)
    folder = download(store, tmp_path / "result")

    # The reference is peft itself, on the real weights of the base model.
    model: Any = PeftModel.from_pretrained(load_base(base), adapters["a"], adapter_name="a")
    model.load_adapter(adapters["b"], "b")
    torch.manual_seed(7)
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in method)
    model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "c", combination_type=name, density=0.5, svd_full_matrices=False)
    model.save_pretrained(tmp_path / "peft", selected_adapters=["c"])
    close(deltas(base, folder), deltas(base, tmp_path / "peft" / "c"))

    again = version_file(
        "2.0.0",
        composition={"parents": [one.model_dump() for one in parents], **arguments},
    )
    make(tmp_path / "again", store, again)
    first, second = tensors(folder), tensors(download(store, tmp_path / "second", version="2.0.0"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_merged_into_the_base_model_answers_like_the_adapter(
    dtype: torch.dtype, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    manifest = composed(tmp_path / "run", store, [publish_adapter(store, adapters["a"], "1.0.0")], into="base")
    assert (manifest.method, manifest.rank) == ("full", None)
    assert [one.version for one in manifest.parents] == ["1.0.0"]
    names = {item.name for item in manifest.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names

    merged = load_base(download(store, tmp_path / "result"))
    adapted: Any = PeftModel.from_pretrained(load_base(base), adapters["a"])
    stored = json.loads((tmp_path / "result" / "config.json").read_text())["dtype"]
    assert stored == str(dtype).removeprefix("torch.")
    assert not torch.allclose(logits(merged), logits(load_base(base)), atol=0.1), "the adapter changes the answers"
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(
        logits(merged), logits(adapted), atol=tolerance, rtol=1e-3 if dtype == torch.float32 else 0.1
    )


def test_a_composition_ends_its_answers_as_its_parents_and_keeps_a_common_template(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    store = MemoryStore()
    store.add_folder("models/tiny/", make_base(tmp_path / "base"))
    template = "Q: {instruction}\nA: "
    asked = {"stop_token_ids": [2], "prompt_template": template}
    one = publish_adapter(store, adapters["a"], "1.0.0", **asked)
    same = publish_adapter(store, adapters["b"], "1.1.0", **asked | {"stop_token_ids": [2, 3]})
    merged = composed(tmp_path / "1", store, [one, same], into="base")
    assert (merged.stop_token_ids, merged.prompt_template) == ([2, 3], template)
    folder = download(store, tmp_path / "result")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert json.dumps("Q: ") in (folder / "chat_template.jinja").read_text()


def test_two_parents_can_be_merged_into_the_base_model(
    base: Path, adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [
        publish_adapter(store, adapters["a"], "1.0.0", 0.5),
        publish_adapter(store, adapters["wide"], "1.0.1", 2.0),
    ]
    composed(tmp_path / "run", store, parents, into="base")
    merged, plain = load_base(download(store, tmp_path / "result")).state_dict(), load_base(base).state_dict()
    found = {name: merged[name] - plain[name] for name in plain if not torch.equal(merged[name], plain[name])}
    close(found, total((0.5, deltas(base, adapters["a"])), (2.0, deltas(base, adapters["wide"]))))


def test_a_seq2seq_model_with_embeddings_is_composed_but_not_merged(tmp_path: Path) -> None:
    base = make_t5(tmp_path / "t5")
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    targets = ["q", "v", "encoder.embed_tokens"]
    parents = [
        publish_adapter(store, make_adapter(base, tmp_path / str(seed), seed, target_modules=targets), f"{seed}.0.0")
        for seed in (1, 2)
    ]
    fields = {"parents": [one.model_dump() for one in parents], "method": "cat"}
    manifest = make(tmp_path / "run", store, version_file(task="seq2seq", composition=fields))
    assert manifest.task == "seq2seq" and "embed_tokens" in manifest.target_modules
    into = version_file("2.0.0", task="seq2seq", method="full", composition=fields | {"into": "base"})
    with pytest.raises(Failure, match="shares these embeddings with its head") as caught:
        make(tmp_path / "merged", store, into)
    assert "into: adapter" in caught.value.remedy


def test_the_base_model_needs_no_memory_for_its_weights(base: Path) -> None:
    model = base_of_shapes(base, "tiny", "causal")
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in model.parameters())
    assert {name: item.shape for name, item in model.named_parameters()} == {
        name: item.shape for name, item in load_base(base).named_parameters()
    }


def failure(caught: pytest.ExceptionInfo[BaseException]) -> tuple[Reason, str, str]:
    found = explain(caught.value)
    return found.reason, found.message, found.remedy


def test_unequal_ranks_are_refused_with_the_parents_and_a_remedy(
    adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [publish_adapter(store, adapters["a"], "1.0.0"), publish_adapter(store, adapters["wide"], "1.0.1")]
    with pytest.raises(Failure) as caught:
        composed(tmp_path / "run", store, parents, method="linear")
    reason, message, remedy = failure(caught)
    assert reason == Reason.ADAPTER_INVALID
    assert "part-1.0.0, part-1.0.1 cannot be combined by linear" in message and "same r value" in message
    assert "cat or svd" in remedy


def test_a_parent_that_was_changed_in_storage_is_not_used(
    adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [publish_adapter(store, adapters["a"], "1.0.0"), publish_adapter(store, adapters["b"], "1.0.1")]
    key = "team-a/adapters/part/1.0.1/adapter_model.safetensors"
    store.kept[key] = store.kept[key][:-4] + b"\0\0\0\1"
    with pytest.raises(Failure, match=r"part-1.0.1 is damaged: adapter_model.safetensors") as caught:
        composed(tmp_path / "run", store, parents)
    assert caught.value.reason == Reason.ADAPTER_INVALID


def test_a_result_with_nan_is_not_published(adapters: dict[str, Path], store: MemoryStore, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapters["a"] / "adapter_config.json").read_bytes())
    weights = tensors(adapters["a"])
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors")
    parents = [publish_adapter(store, broken, "1.0.0"), publish_adapter(store, adapters["b"], "1.0.1")]
    with pytest.raises(Failure, match="holds NaN or infinity"):
        composed(tmp_path / "run", store, parents)
    assert not [key for key in store.kept if key.startswith("team-a/adapters/both/")]


def test_a_merge_needs_the_revision_that_the_parent_was_tuned_on(
    adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    other = ManifestBaseModel(name="tiny", uri=BASE, digest="sha256:" + "0" * 64)
    parent = publish_adapter(store, adapters["a"], "1.0.0", base_model=other)
    with pytest.raises(Failure, match="the parents belong to"):
        composed(tmp_path / "run", store, [parent], into="base")


def test_a_second_attempt_finds_the_version_and_another_job_cannot_publish_it(
    adapters: dict[str, Path], store: MemoryStore, tmp_path: Path
) -> None:
    parents = [publish_adapter(store, adapters["a"], "1.0.0"), publish_adapter(store, adapters["b"], "1.0.1")]
    first = composed(tmp_path / "run", store, parents)
    store.written.clear()
    assert composed(tmp_path / "again", store, parents) == first
    assert store.written == []
    fields = {"parents": [one.model_dump() for one in parents], "method": "cat"}
    other = {"name": "both-1.0.0", "namespace": "team-a", "uid": "uid-other"}
    with pytest.raises(Failure) as caught:
        make(tmp_path / "other", store, version_file(job=other, composition=fields))
    assert caught.value.reason == Reason.VERSION_EXISTS
