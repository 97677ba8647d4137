"""Multimodal models, mixtures and state-space models: what is tuned, and under which names it is served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graft.api.recipe import Lora, Method
from graft.contracts.progress import Reason
from graft_trainer.model.basemodel import check_base_model, load_config
from graft_trainer.model.methods import make_tunable
from graft_trainer.model.model import BaseModel, load_base_model
from graft_trainer.model.trial import try_method
from graft_trainer.model.wrappers import language_parameters, served_class
from graft_trainer.recipe.resolve import Device, limits
from graft_trainer.run.failures import Failure
from graft_trainer.versions.publish import name_as_served
from peft import PeftModel
from transformers import AutoConfig
from worlds.architectures import MIXTURES, MULTIMODAL, OTHERS, SMALL, gemma3n_config, save_model
from worlds.trainer import make_job

CPU = Device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(build, root / name) for name, build in (MULTIMODAL | OTHERS).items()}


def loaded(folder: Path, method: dict[str, Any]) -> tuple[Any, BaseModel]:
    job = make_job(method=method)
    return job, load_base_model(folder, "m", "causal", job.method, limits(job, CPU, 128), CPU)


def backward(model: Any) -> None:
    ids = torch.randint(10, 300, (2, 12))
    model.train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


@pytest.mark.parametrize("name", MULTIMODAL | OTHERS)
def test_what_a_preset_reaches_gets_a_gradient(folders: dict[str, Path], name: str) -> None:
    check_base_model(folders[name], name, method="lora")
    job, base = loaded(folders[name], {"lora": {"rank": 2, "targetModules": "all-linear"}})
    tuned = make_tunable(job, base, folders[name], lambda: None)
    backward(tuned.model)
    first = {key: p.grad for key, p in tuned.model.named_parameters() if ".lora_B." in key and p.requires_grad}
    assert first and [key for key, grad in first.items() if grad is None or not grad.any()] == []
    assert not [key for key in first if "vis" in key or "projector" in key]
    # The pod without a GPU comes to the same targets, from config.json alone.
    assert try_method(folders[name], name, "causal", job.method).targets == tuned.targets


@pytest.mark.parametrize("name", MULTIMODAL)
def test_full_trains_the_language_model_alone(folders: dict[str, Path], name: str) -> None:
    job, base = loaded(folders[name], {"full": {}})
    tuned = make_tunable(job, base, folders[name], lambda: None)
    backward(tuned.model)
    assert [key for key, p in tuned.model.named_parameters() if p.requires_grad and p.grad is None] == []
    reached = {id(p): p.numel() for p in language_parameters(tuned.model)}  # a shared weight counts once
    assert sum(reached.values()) == tuned.trainable
    assert not [key for key, p in tuned.model.named_parameters() if p.requires_grad and "vis" in key]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_an_adapter_is_saved_under_the_names_of_the_model_that_is_served(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder = folders[name]
    job, base = loaded(folder, {"lora": {"rank": 2}})
    tuned = make_tunable(job, base, folder, lambda: None)
    torch.manual_seed(1)
    for key, parameter in tuned.model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.model.save_pretrained(tmp_path)
    name_as_served(SimpleNamespace(method="lora", folder=folder, model=tuned.model, task="causal"), tmp_path)  # type: ignore[arg-type]

    config = load_config(folder, name)
    whole = served_class(config, "causal").from_pretrained(folder)
    assert type(whole).__name__ == config.architectures[0]
    ids = torch.randint(10, 300, (1, 9))
    plain = whole(input_ids=ids).logits
    served = PeftModel.from_pretrained(whole, tmp_path).eval()
    wanted = tuned.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(served(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.01
    # vLLM finds a module by these names; those of a vision tower are in no adapter.
    on_tower = [key for key, _ in served.named_modules() if "lora_A" in key and "vis" in key]
    assert on_tower == []


def test_presets_say_what_they_leave_out_of_a_mixture(folders: dict[str, Path]) -> None:
    for name, targets in (
        ("mixtral", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("qwen2_moe", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ):
        found = try_method(folders[name], name, "causal", Method(lora=Lora()))
        assert found.targets == targets  # of Qwen2's MoE, the shared expert
        assert (
            found.unreached
            and "no preset reaches the experts of this mixture (down_proj, gate_up_proj: " in found.unreached
        )
        assert (
            try_method(folders[name], name, "causal", Method(lora=Lora(target_modules="attention"))).unreached is None
        )
    with pytest.raises(Failure, match=r"experts\.gate_up_proj would mean the experts") as caught:
        names = Lora(target_module_names=["q_proj", "experts.gate_up_proj"])
        try_method(folders["mixtral"], "mixtral", "causal", Method(lora=names))
    assert "Leave them out of spec.method.lora.targetModuleNames" in caught.value.remedy


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_family_of_mixtures_says_that_no_preset_reaches_its_experts(kind: str, tmp_path: Path) -> None:
    fields, experts = MIXTURES[kind]
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(kind, **(({} if kind == "dbrx" else SMALL) | {"vocab_size": 320} | ids | fields))
    config.save_pretrained(tmp_path)
    found = try_method(tmp_path, kind, "causal", Method(lora=Lora()))
    assert found.unreached and f"the experts of this mixture ({', '.join(experts)}: " in found.unreached
    assert not {"gate", "wg", "router", "classifier", "layer"} & set(found.targets)  # a router
    with pytest.raises(Failure, match=f"targetModuleNames: {experts[0]} would mean the experts") as caught:
        try_method(tmp_path, kind, "causal", Method(lora=Lora(target_module_names=[experts[0]])))
    assert "method full, which trains them" in caught.value.remedy


def test_a_model_that_needs_a_package_is_refused_by_its_name(tmp_path: Path) -> None:
    config = gemma3n_config()
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        Failure, match=r"gemma needs a package that the trainer's image does not have: .*timm"
    ) as caught:
        try_method(tmp_path, "gemma", "causal", Method(lora=Lora()))
    assert caught.value.reason == Reason.BASE_MODEL_INVALID


def test_presets_leave_out_what_a_state_space_kernel_bypasses(folders: dict[str, Path]) -> None:
    assert try_method(folders["mamba"], "mamba", "causal", Method(lora=Lora())).targets == ["in_proj"]
    targets = try_method(folders["bamba"], "bamba", "causal", Method(lora=Lora())).targets
    assert "in_proj" in targets and "q_proj" in targets and "out_proj" not in targets
    with pytest.raises(Failure, match="which matches no module of this model; it has in_proj"):
        try_method(folders["mamba"], "mamba", "causal", Method(lora=Lora(target_modules="attention")))
    with pytest.raises(Failure, match="'out_proj' is incompatible with Mamba-based models"):
        try_method(folders["mamba"], "mamba", "causal", Method(lora=Lora(target_module_names=["out_proj"])))
