"""Helpers for the tests of composed and imported versions: small published adapters whose updates are not zero."""

from pathlib import Path
from typing import Any

import torch
from graft.artifacts.layout import adapter_prefix
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.versions import describe_files, verify
from graft.contracts.job import ParentVersion, VersionFile
from graft_trainer.versions.make_version import run
from graft_trainer.versions.making import Making
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from worlds.buckets import publish
from worlds.trainer import MemoryStore, make_settings

BASE = "s3://bucket/models/tiny"
TOKENS = torch.tensor([[1, 17, 40, 33, 60, 5, 90]])


def load_base(folder: Path) -> Any:
    kind = AutoModelForSeq2SeqLM if "T5" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, seed: int, rank: int = 4, **config: Any) -> Path:
    """Save a LoRA adapter with random A and B for this base model, in peft's layout. Return its folder."""
    torch.manual_seed(seed)
    task = "SEQ_2_SEQ_LM" if "T5" in (base / "config.json").read_text() else "CAUSAL_LM"
    fields = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"], "task_type": task} | config
    model = get_peft_model(load_base(base), LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def publish_adapter(
    store: MemoryStore, folder: Path, version: str, weight: float = 1.0, **manifest: Any
) -> ParentVersion:
    """Publish an adapter as a training pod does. Return the entry that names it as a parent."""
    files = {name: folder / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    fields: dict[str, Any] = {
        "adapter": "part", "version": version, "method": "lora", "recipe": "r", "hyperparameters": {},
        "base_model": ManifestBaseModel(name="tiny", uri=BASE),
        "job": ManifestJob(name="j", namespace="team-a", uid=f"uid-{version}", attempt="0"),
        "files": describe_files(files), "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    prefix = adapter_prefix("team-a", "part", version)
    digest = publish(store, prefix, files, Manifest(**(fields | manifest)))  # type: ignore[arg-type]
    return ParentVersion(
        name=f"part-{version}", version=version, uri=f"s3://bucket/{prefix}", digest=digest, weight=weight
    )


def version_file(version: str = "1.0.0", **changes: Any) -> VersionFile:
    fields: dict[str, Any] = {
        "job": {"name": f"both-{version}", "namespace": "team-a", "uid": f"uid-both-{version}"},
        "tenant": "team-a",
        "baseModel": {"name": "tiny", "uri": BASE},
        "output": {"adapter": "both", "version": version},
        "method": "lora",
    }
    return VersionFile.model_validate(fields | changes)


def composed(root: Path, store: MemoryStore, parents: list[ParentVersion], **changes: Any) -> Manifest:
    """Run the composition. Return the published manifest after verifying the version."""
    method = "full" if changes.get("into") == "base" else "lora"
    composition = {"parents": [item.model_dump() for item in parents], "method": "cat"} | changes
    return make(root, store, version_file(method=method, composition=composition))


def make(root: Path, store: MemoryStore, file: VersionFile) -> Manifest:
    root.mkdir(exist_ok=True)
    digest = run(Making(file, make_settings(root), store))  # type: ignore[arg-type]
    prefix = adapter_prefix("team-a", file.output.adapter, file.output.version)
    return verify(store, prefix, digest)  # type: ignore[arg-type]


def download(store: MemoryStore, folder: Path, adapter: str = "both", version: str = "1.0.0") -> Path:
    folder.mkdir(parents=True)
    prefix = adapter_prefix("team-a", adapter, version)
    for key, data in store.kept.items():
        if key.startswith(prefix):
            (folder / key.removeprefix(prefix)).write_bytes(data)
    return folder


def deltas(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the change of each weight when the adapter is merged into the base model, without unchanged weights."""
    before = {name: tensor.clone() for name, tensor in load_base(base).state_dict().items()}
    model: Any = PeftModel.from_pretrained(load_base(base), folder)
    after = model.merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
