"""Measure the effect of an adapter that was composed or imported, as training measures it when it publishes.

Only this needs the base model's weights. They stay on the disk: transformers maps the files of a model into memory, so a
model of any size takes the memory of its activations.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.artifacts.manifest import Effect, ManifestBaseModel
from graft.artifacts.sources import SourceError
from peft import PeftModel

from graft_trainer.model.basemodel import check_base_model, load_config, load_tokenizer, stored_quantization
from graft_trainer.model.model import stacked_of, stored_dtype
from graft_trainer.model.shapes import base_of_shapes
from graft_trainer.model.wrappers import served_class
from graft_trainer.run.failures import Failure, out_of_memory
from graft_trainer.versions.effect import LOWEST, effect_of, expected_effect, size, special_tokens
from graft_trainer.versions.making import Making

log = logging.getLogger(__name__)
LONGEST = 300  # characters of the reason in the manifest


class Unmeasured(Exception):
    """The effect cannot be measured here. The message says why."""


def measured_effect(making: Making, base: ManifestBaseModel, base_config: Path, adapter: Path) -> Effect | None:
    """Return the record of the adapter in the folder `adapter`: what it changes in the answers of the base model. None if
    it changes nothing.

    If it cannot be measured, the record has the reason, and a server only checks that there is an effect. `base`: the
    revision to which the adapter belongs. `base_config`: the folder with the config of the base model.
    """
    name = base.name
    expected = expected_effect(load_config(base_config, name), adapter / "adapter_model.safetensors")
    if expected is None:
        return None
    try:
        if making.file.unmeasured is not None:
            raise Unmeasured(making.file.unmeasured)
        effect = _measure(making, base, base_config, adapter)
    except Unmeasured as error:
        log.warning("the effect of the adapter is not measured: %s", error)
        return expected.model_copy(update={"unmeasured": str(error)[:LONGEST]})
    log.info("effect on the next token: %.3f nats", max(map(size, effect.prompts)))
    return effect


def _measure(making: Making, base: ManifestBaseModel, base_config: Path, adapter: Path) -> Effect:
    """Download the base model and ask it with and without the adapter. Raises Unmeasured."""
    name, task = base.name, making.file.task
    if stacked_of(base_of_shapes(base_config, name, task)) is not None:
        raise Unmeasured(f"{name} is a mixture, whose experts this Job would have to hold in memory")
    folder = _fetch(making, base)
    try:
        if stored_quantization(check_base_model(folder, name, task)) is not None:
            raise Unmeasured(f"{name} is quantised, and this Job has no GPU to compute with such weights")
        config = load_config(folder, name)
        plain: Any = served_class(config, task).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=stored_dtype(config)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about shared embeddings
            model: Any = PeftModel.from_pretrained(plain, adapter, torch_device="cpu").eval()

        @contextmanager
        def without_adapter() -> Iterator[Any]:
            with model.disable_adapter():
                yield model

        effect = effect_of(model, without_adapter, task, special_tokens(load_tokenizer(folder, name)))
    except Failure as error:
        raise Unmeasured(error.message) from error
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        log.info("the traceback:", exc_info=error)
        raise Unmeasured(f"{name} cannot answer in this Job: {type(error).__name__}: {error}") from error
    finally:
        if folder == making.settings.base_model_dir:
            shutil.rmtree(folder, ignore_errors=True)  # the disk may be needed for the upload
    if min(min(*prompt.base, *prompt.adapter) for prompt in effect.prompts) <= LOWEST:
        raise Unmeasured(f"{name} answers with numbers that are not finite in {stored_dtype(config)}")
    return effect


def _fetch(making: Making, base: ManifestBaseModel) -> Path:
    """Return the folder with the base model's files. Raises Unmeasured, and SourceError if a retry may succeed."""
    try:
        return making.fetch(base.uri, base.digest, making.settings.base_model_dir, "base model")
    except SourceError as error:
        if error.transient:
            raise
        raise Unmeasured(f"the base model's files cannot be read: {error}") from error
    except OSError as error:
        raise Unmeasured(f"the base model does not fit on the disk of this Job: {error}") from error
