"""Base models whose files are quantised already: trained beside, or refused before a GPU with a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.api.recipe import Method
from graft.contracts.progress import Reason
from graft_trainer.__main__ import needs_bitsandbytes
from graft_trainer.model.basemodel import check_base_model
from graft_trainer.model.methods import make_tunable
from graft_trainer.model.model import load_base_model
from graft_trainer.prepare import preflight
from graft_trainer.recipe.resolve import Device, limits
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Prepared
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run, make_settings

CPU = Device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao"},
}


def quantised(base: Path, folder: Path, bits: int) -> Path:
    """Save the base model in the integers of bitsandbytes."""
    shutil.copytree(base, folder)
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_prepare_names_the_kind_and_what_to_use_instead(base: Path, tmp_path: Path, kind: str, nested: bool) -> None:
    store = MemoryStore({"team-a/data/train.jsonl": chat_lines(6), "team-a/data/eval.jsonl": chat_lines(3)})
    store.add_folder("models/tiny/", base)
    config = json.loads(store.kept["models/tiny/config.json"])
    (config.setdefault("text_config", {}) if nested else config)["quantization_config"] = KINDS[kind]
    store.kept["models/tiny/config.json"] = json.dumps(config).encode()
    for method in ({"lora": {}}, {"qlora": {}}, {"full": {}}, {"promptTuning": {}}):
        with pytest.raises(Failure) as caught:
            preflight(make_run(tmp_path / next(iter(method)), store, make_job(method=method)))
        assert caught.value.reason == Reason.BASE_MODEL_INVALID
        assert caught.value.message == f"tiny is quantised already ({kind}), so no method can train it"
        assert "weights in 16 bits" in caught.value.remedy and "qlora" in caught.value.remedy


@pytest.mark.parametrize(("bits", "methods"), [(4, ("lora", "qlora", "promptTuning")), (8, ("lora", "promptTuning"))])
def test_methods_train_beside_the_integers_of_bitsandbytes(
    base: Path, tmp_path: Path, bits: int, methods: tuple[str, ...]
) -> None:
    folder = quantised(base, tmp_path / "base", bits)
    for name in methods:
        check_base_model(folder, "tiny", method=name)  # type: ignore[arg-type]
        fields: dict[str, Any] = {"virtualTokens": 2} if name == "promptTuning" else {"rank": 2}
        job = make_job(method={name: fields})
        model = load_base_model(folder, "tiny", "causal", job.method, limits(job, CPU, 128), CPU)
        tuned = make_tunable(job, model, folder, lambda: None)
        ids = torch.randint(10, 200, (2, 12))
        tuned.model.train()
        tuned.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        assert all(p.grad is not None for p in tuned.model.parameters() if p.requires_grad)
    for name in {"full", "lora", "qlora", "promptTuning"} - set(methods):
        with pytest.raises(Failure, match=f"so method {name} cannot train it") as caught:
            check_base_model(folder, "tiny", method=name)  # type: ignore[arg-type]
        assert caught.value.remedy.startswith("Set spec.method to lora")


def test_train_imports_bitsandbytes_for_weights_that_need_it(tmp_path: Path) -> None:
    settings, job = make_settings(tmp_path), make_job(method=Method.model_validate({"lora": {}}))
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    assert not needs_bitsandbytes(job, settings)
    for quantized in (False, True):
        Prepared("base", {}, {}, quantized).write(settings.prepared_file)
        assert needs_bitsandbytes(job, settings) is quantized
