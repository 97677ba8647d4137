"""What a version records of its effect: measured after training, and expected of what is imported or composed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from graft.artifacts.manifest import Manifest, ManifestBaseModel
from graft.contracts.job import VersionFile
from graft_trainer.evaluation.evaluate import Evaluated
from graft_trainer.versions.effect import expected_effect, size
from graft_trainer.versions.publish import publish
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from worlds.architectures import mixtral, save_model
from worlds.composition import download, make, make_adapter, publish_adapter, version_file
from worlds.trainer import MemoryStore, make_base, make_job, make_qwen, make_t5, ready, train_prepared

PREFIX = "team-a/adapters/colours/1.0.0/"
AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
FAST = {"maxSteps": 10, "loggingSteps": 5, "perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 1}

pytestmark = pytest.mark.usefixtures("quick")


def published(tmp_path: Path, base: Path, task: str, method: dict[str, Any], rate: float) -> tuple[Manifest, Path]:
    """Train and publish. Return the manifest and the folder with the adapter's files."""
    job = make_job(task=task, method=method, training=FAST | {"learningRate": rate})
    run, store = ready(tmp_path, base, job)
    publish(run, train_prepared(run), Evaluated({}))
    folder = tmp_path / "version"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if PREFIX + name in store.kept:
            (folder / name).write_bytes(store.kept[PREFIX + name])
    return Manifest.read(store.kept[PREFIX + "manifest.json"]), folder


@pytest.mark.parametrize(
    ("task", "method", "rate"),
    [
        ("causal", {"lora": {"rank": 8}}, 0.01),
        ("causal", {"promptTuning": {"virtualTokens": 8}}, 0.3),
        ("seq2seq", {"lora": {"rank": 8}}, 0.01),
        ("seq2seq", {"promptTuning": {"virtualTokens": 8}}, 0.3),
    ],
    ids=["lora", "prompt", "seq2seq lora", "seq2seq prompt"],
)
def test_the_record_is_what_plain_peft_answers(tmp_path: Path, task: str, method: dict[str, Any], rate: float) -> None:
    base = (make_base if task == "causal" else make_t5)(tmp_path / "base")
    manifest, folder = published(tmp_path, base, task, method, rate)
    check_record(manifest, base, folder, task)


def check_record(manifest: Manifest, base: Path, folder: Path, task: str) -> None:
    """Compare the record with the answers of plain transformers and peft."""
    assert manifest.effect is not None and size(manifest.effect.prompts[0]) > 0.02
    assert manifest.effect.unmeasured is None
    plain = AUTO[task].from_pretrained(base).eval()
    answers = {"base": plain, "adapter": PeftModel.from_pretrained(AUTO[task].from_pretrained(base), folder).eval()}
    for prompt in manifest.effect.prompts:
        assert len(prompt.tokens) >= 8
        ids = torch.tensor([prompt.prompt])
        more = {"decoder_input_ids": torch.tensor([[plain.config.decoder_start_token_id]])} if task == "seq2seq" else {}
        for who, model in answers.items():
            with torch.no_grad():
                found = torch.log_softmax(model(input_ids=ids, **more).logits[0, -1], dim=-1)
            assert torch.allclose(found[prompt.tokens], torch.tensor(getattr(prompt, who)), atol=1e-3), who


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
@pytest.mark.parametrize("way", ["composed", "imported"])
def test_what_is_composed_or_imported_is_measured_on_its_base(tmp_path: Path, way: str, task: str) -> None:
    base = (make_base if task == "causal" else make_t5)(tmp_path / "base")
    kind = {"target_modules": ["q", "v"]} if task == "seq2seq" else {}
    adapters = [make_adapter(base, tmp_path / str(seed), seed, **kind) for seed in (1, 2)]
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    manifest = make(tmp_path / "run", store, file_of(way, store, adapters, task=task))
    check_record(manifest, base, download(store, tmp_path / "result"), task)
    assert not (tmp_path / "run/work/base-model").exists(), "the disk is needed for other files"


def file_of(
    way: str, store: MemoryStore, adapters: list[Path], base_model: ManifestBaseModel | None = None, **changes: Any
) -> VersionFile:
    """Return the input of the pod that composes the adapters, tuned on `base_model`, or imports the first."""
    tuned_on = {} if base_model is None else {"base_model": base_model}
    if way == "imported":
        store.add_folder("team-a/theirs/", adapters[0])
        return version_file(source="s3://bucket/team-a/theirs/", **changes)
    parents = [
        publish_adapter(store, folder, f"1.0.{at}", **tuned_on).model_dump() for at, folder in enumerate(adapters)
    ]
    return version_file(composition={"parents": parents, "method": "cat"}, **changes)


@pytest.mark.parametrize("way", ["composed", "imported"])
def test_what_cannot_be_measured_says_why(tmp_path: Path, way: str) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2)]

    def reason(at: str, replaced: dict[str, bytes], base_model: ManifestBaseModel | None = None, **changes: Any) -> str:
        store = MemoryStore()
        store.add_folder("models/tiny/", base)
        store.kept |= {f"models/tiny/{name}": data for name, data in replaced.items()}
        manifest = make(tmp_path / at, store, file_of(way, store, adapters, base_model, **changes))
        assert manifest.effect is not None and manifest.effect.unmeasured is not None
        assert not any(prompt.tokens for prompt in manifest.effect.prompts)
        return manifest.effect.unmeasured

    assert (
        reason("large", {}, unmeasured="the base model's files have 140 GiB") == "the base model's files have 140 GiB"
    )
    if way == "composed":
        other = ManifestBaseModel(name="tiny", uri="s3://bucket/models/tiny", digest="sha256:" + "0" * 64)
        assert "changed since" in reason("moved", {}, base_model=other)
    assert "model.safetensors" in reason("damaged", {"model.safetensors": b"damaged"})


def test_a_mixture_is_not_measured_because_its_experts_would_be_in_memory(tmp_path: Path) -> None:
    base = save_model(mixtral, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", 1)
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    manifest = make(tmp_path / "run", store, file_of("imported", store, [adapter]))
    assert manifest.effect is not None and "is a mixture" in str(manifest.effect.unmeasured)


def test_biases_that_were_trained_beside_an_adapter_are_not_part_of_the_base(tmp_path: Path) -> None:
    base = make_qwen(tmp_path / "base")
    method = {"lora": {"rank": 8, "bias": "all", "targetModuleNames": ["q_proj"]}}
    manifest, _ = published(tmp_path, base, "causal", method, 0.01)
    assert manifest.effect is not None
    prompt = manifest.effect.prompts[0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(input_ids=torch.tensor([prompt.prompt])).logits[0, -1]
    found = torch.log_softmax(logits.float(), dim=-1)[prompt.tokens]
    assert torch.allclose(found, torch.tensor(prompt.base), atol=1e-3)


def test_a_quantised_base_is_measured_as_it_was_trained(tmp_path: Path) -> None:
    manifest, _ = published(tmp_path, make_base(tmp_path / "base"), "causal", {"qlora": {"rank": 8}}, 0.01)
    assert manifest.effect is not None and size(manifest.effect.prompts[0]) > 0.02


def test_a_whole_model_records_nothing(tmp_path: Path) -> None:
    manifest, _ = published(tmp_path, make_base(tmp_path / "base"), "causal", {"full": {}}, 0.003)
    assert manifest.effect is None


def test_an_adapter_that_changes_nothing_has_no_expected_effect(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    _, folder = published(tmp_path, base, "causal", {"lora": {"rank": 8}}, 0.01)
    config, weights = AutoConfig.from_pretrained(base), folder / "adapter_model.safetensors"
    found = expected_effect(config, weights)
    assert found is not None and all(not prompt.tokens for prompt in found.prompts)
    assert all(0 <= token < config.vocab_size for prompt in found.prompts for token in prompt.prompt)
    tensors = load_file(weights)
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}, weights)
    assert expected_effect(config, weights) is None
