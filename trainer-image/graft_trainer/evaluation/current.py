"""The adapter's newest version, loaded beside the new one to be measured on the same data.

Its files are other people's: every digest is verified, weights are safetensors only, and of its config only what describes
the adapter is used.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.artifacts.manifest import Manifest
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.contracts.job import CurrentVersion
from peft import PeftModel
from transformers import AutoTokenizer

from graft_trainer.evaluation.subject import Subject
from graft_trainer.model.basemodel import TOKENIZERS
from graft_trainer.model.model import AUTO_CLASSES
from graft_trainer.model.model_placement import place
from graft_trainer.run.download import fetch_version
from graft_trainer.run.failures import out_of_memory
from graft_trainer.run.run import Run
from graft_trainer.train import Trained

log = logging.getLogger(__name__)
NAME = "current"  # of the adapter on the model, beside peft's "default"
KNOWN = {
    "LORA": ("r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern"),
    "PROMPT_TUNING": ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"),
}  # fmt: skip


class NotComparable(Exception):
    """Why the version cannot be measured beside the new one, and what to do."""


@contextmanager
def current_version(run: Run, trained: Trained, current: CurrentVersion, tuned: Subject) -> Iterator[Subject]:
    """The version as something to measure like `tuned`. NotComparable when it cannot be had or belongs to another base model."""
    folder = run.settings.work_dir / "current"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        manifest = _fetch(run, current, folder)
        if manifest.method == "full":
            yield _whole_model(folder, trained, tuned)
            return
        same = (manifest.base_model.uri, manifest.base_model.digest)
        if same != (run.job.base_model.uri, run.job.base_model.digest):
            raise NotComparable(
                f"{current.version} belongs to {manifest.base_model.name} ({manifest.base_model.uri}); compare with base, or "
                "give min and max, when the base model changes"
            )
        with _adapter(folder, trained) as model:
            config = model.active_peft_config
            virtual = config.num_virtual_tokens if config.is_prompt_learning else 0
            room = None if tuned.room is None else tuned.room + tuned.virtual_tokens - virtual
            yield replace(tuned, who="current", model=model, room=room, virtual_tokens=virtual)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(run: Run, current: CurrentVersion, folder: Path) -> Manifest:
    try:
        manifest = fetch_version(run.store, current.uri, current.digest, folder)
    except InvalidArtifact as error:
        raise NotComparable(f"{current.version} is damaged: {error}; publish it again") from error
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        raise NotComparable(f"{current.version} cannot be read: {error}") from error
    log.info("current version: %s %s, %s", manifest.adapter, manifest.version, manifest.method)
    return manifest


def _whole_model(folder: Path, trained: Trained, tuned: Subject) -> Subject:
    """A version of the method full: its own weights, and its own tokenizer where it brought one."""
    loader: Any = AUTO_CLASSES[trained.task]
    with _fitting("its weights cannot be loaded"):
        model = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=trained.model.dtype
        )
        if place(model).device.type == "cpu" != trained.model.device.type:
            raise NotComparable("there is no memory for it beside the new one")
        own = any((folder / name).exists() for name in TOKENIZERS)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if own else trained.tokenizer
    return replace(tuned, who="current", model=model.eval(), tokenizer=tokenizer, virtual_tokens=0)


@contextmanager
def _adapter(folder: Path, trained: Trained) -> Iterator[Any]:
    """The current adapter on the base model of the new one, as the only active one."""
    kind = _reduce_config(folder / "adapter_config.json", trained.task)
    model, problem = trained.model, "its adapter does not fit on the base model"
    if kind == "LORA" and isinstance(model, PeftModel) and model.active_peft_config.peft_type == "LORA":
        # Both in the same layers, of which one is active.
        default = model.active_adapter
        with _fitting(problem):
            model.load_adapter(folder, NAME, is_trainable=False)
        try:
            model.set_adapter(NAME, inference_mode=True)
            yield model.eval()
        finally:
            model.set_adapter(default, inference_mode=True)
            model.delete_adapter(NAME)
        return
    with trained.base_model() as base:
        plain = base.get_base_model() if isinstance(base, PeftModel) else base
        with _fitting(problem):
            wrapped = PeftModel.from_pretrained(plain, folder, adapter_name=NAME, is_trainable=False)
        try:
            yield wrapped.eval()
        finally:
            if kind == "LORA":
                wrapped.unload()


@contextmanager
def _fitting(problem: str) -> Iterator[None]:
    """What loading can raise over files that are whole but do not belong here, as NotComparable."""
    try:
        yield
    except Exception as error:
        why = "there is no memory for it beside the new one" if out_of_memory(error) else str(error)
        raise NotComparable(f"{problem}: {why}") from error


def _reduce_config(path: Path, task: str) -> str:
    """Leave in the config what describes the adapter; its kind. A text to start from, a tokenizer to load and the like were
    for training."""
    config = json.loads(path.read_text())
    kind = config.get("peft_type")
    if kind not in KNOWN:
        raise NotComparable(f"its adapter is of the kind {kind}, which is not known here; compare with base instead")
    if config.get("bias", "none") != "none":
        # They would take the place of the base model's for all who are measured.
        raise NotComparable("it trained biases of the base model; compare with base instead")
    reduced = {name: config[name] for name in KNOWN[kind] if name in config}
    reduced |= {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if task == "causal" else "SEQ_2_SEQ_LM",
        "inference_mode": True,
    }
    if kind == "PROMPT_TUNING":
        reduced["prompt_tuning_init"] = "RANDOM"
    path.write_text(json.dumps(reduced))
    return str(kind)
