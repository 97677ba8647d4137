"""Load the adapter's newest Ready version beside the new one, to measure both on the same data.

Its files are not trusted. Every digest is verified, and only safetensors weights are loaded. Of an adapter's config,
only the fields that describe the adapter are used.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.artifacts.manifest import VOCABULARIES, Manifest
from graft.artifacts.sources import CONFIG_LIMITS
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.bounded import OutOfBounds, parse_json
from graft.contracts.job import CurrentVersion
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from graft_trainer.evaluation.subject import Subject
from graft_trainer.model.adapterfiles import rename_modules
from graft_trainer.model.basemodel import load_config
from graft_trainer.model.model_placement import place
from graft_trainer.model.wrappers import serving_names, tuned_class
from graft_trainer.run.download import fetch_version
from graft_trainer.run.failures import out_of_memory
from graft_trainer.run.run import Run
from graft_trainer.train import Trained

log = logging.getLogger(__name__)
USE_BASE = "Use over: base in spec.evaluation.gates"
NO_MEMORY = "the current and the new version do not fit in memory together"
NAME = "current"  # the current adapter's name on the model; the new one has peft's name "default"
KNOWN = {
    "LORA": ("r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern"),
    "PROMPT_TUNING": ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"),
}  # fmt: skip


class NotComparable(Exception):
    """The current version cannot be measured beside the new one. The message says why and what to do."""


@contextmanager
def current_version(run: Run, trained: Trained, current: CurrentVersion, tuned: Subject) -> Iterator[Subject]:
    """Yield the current version as a Subject that is measured like `tuned`.

    Raises NotComparable if the version cannot be read or loaded, or if it belongs to another base model. Raises
    StoreError if the store is unavailable.
    """
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
                f"{current.version} belongs to another base model, or to other files of it: {manifest.base_model.name} "
                f"({manifest.base_model.uri}). When the base model changes, use over: base, min or max in spec.evaluation.gates"
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
        raise NotComparable(f"{current.version} is damaged: {error}. Publish the adapter again") from error
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        raise NotComparable(f"{current.version} cannot be read: {error}") from error
    log.info("current version: %s %s, %s", manifest.adapter, manifest.version, manifest.method)
    return manifest


def _whole_model(folder: Path, trained: Trained, tuned: Subject) -> Subject:
    """Load a version of the method `full`: its own weights, and its own tokenizer if it has one."""
    with _fitting("the current version's weights cannot be loaded"):
        kind: Any = tuned_class(AutoConfig.from_pretrained(folder, local_files_only=True), trained.task)
        model = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=trained.model.dtype
        )
        if place(model).device.type == "cpu" != trained.model.device.type:
            raise NotComparable(NO_MEMORY)
        own = any((folder / name).exists() for name in VOCABULARIES)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if own else trained.tokenizer
    return replace(tuned, who="current", model=model.eval(), tokenizer=tokenizer, virtual_tokens=0)


@contextmanager
def _adapter(folder: Path, trained: Trained) -> Iterator[Any]:
    """Yield the new version's base model with the current adapter as the only active one."""
    kind = _reduce_config(folder / "adapter_config.json", trained.task)
    model, problem = trained.model, "the current version's adapter cannot be loaded on the base model"
    if kind == "LORA":
        with _fitting(problem):
            _name_as_tuned(folder, trained)
    if kind == "LORA" and isinstance(model, PeftModel) and model.active_peft_config.peft_type == "LORA":
        # The same layers hold both adapters, and one of them is active.
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


def _name_as_tuned(folder: Path, trained: Trained) -> None:
    """Rename the modules of a published adapter of a multimodal model, whose language model alone is in memory."""
    model = trained.model.get_base_model() if isinstance(trained.model, PeftModel) else trained.model
    names = serving_names(model, load_config(trained.folder, str(trained.folder)), trained.task)
    if names is not None:
        rename_modules(folder, names.inward)


@contextmanager
def _fitting(problem: str) -> Iterator[None]:
    """Raise any error of loading as NotComparable. The files are intact, but may not fit the model or the memory."""
    try:
        yield
    except Exception as error:
        why = NO_MEMORY if out_of_memory(error) else str(error)
        raise NotComparable(f"{problem}: {why}") from error


def _reduce_config(path: Path, task: str) -> str:
    """Reduce the config file to the fields that describe the adapter. Return its peft_type. The removed fields are for
    training only, for example an initial text or a tokenizer to load."""
    try:
        config = parse_json(path.read_bytes(), CONFIG_LIMITS, path.name)
    except OutOfBounds as error:
        raise NotComparable(f"the current version's {error}. {USE_BASE}") from error
    if not isinstance(config, dict):
        raise NotComparable(f"the current version's {path.name} is not a JSON object. {USE_BASE}")
    kind = config.get("peft_type")
    if kind not in KNOWN:
        raise NotComparable(
            f"the current version's adapter has the peft_type {kind}, which is not supported. {USE_BASE}"
        )
    if config.get("bias", "none") != "none":
        # Loading it would replace the base model's biases for every subject.
        raise NotComparable(f"the current version trained biases of the base model. {USE_BASE}")
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
