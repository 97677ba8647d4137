"""Which class of transformers holds a model, which part of it is the language model, and what its modules are called where
it is served.

Many models of today are multimodal. Only their language model is tuned. The vision tower gets no text, so that none of its
weights would get a gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from graft.artifacts.modulenames import Renaming, find_renaming
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from graft_trainer.data.tokens import Task


def tuned_class(config: Any, task: Task) -> Any:
    """Return the auto class that loads a model for training. It is the language model alone where transformers has a class
    for it, else the whole model."""
    if task == "seq2seq":
        return AutoModelForSeq2SeqLM
    alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if alone or not is_wrapper(config) else AutoModelForImageTextToText


def served_class(config: Any, task: Task) -> Any:
    """Return the auto class of the model that servers build: that which config.json names in `architectures`."""
    named = set(getattr(config, "architectures", None) or ())
    if task == "causal" and is_wrapper(config) and named & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
        return AutoModelForImageTextToText
    return tuned_class(config, task)


def is_wrapper(config: Any) -> bool:
    """Return whether the config is that of a multimodal model around a language model."""
    return not getattr(config, "is_encoder_decoder", False) and config.get_text_config() is not config


def language_model(model: Any) -> str:
    """Return the name of the blocks of the language model in a multimodal model, "" for a language model."""
    if not is_wrapper(model.config):
        return ""
    blocks = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is blocks), "")


def image_layers(model: Any) -> list[str]:
    """Return parts of the names of the layers that attend to an image (Llama 3.2 Vision). Text passes them by."""
    text = model.config.get_text_config()
    return [f".layers.{index}." for index in getattr(text, "cross_attention_layers", None) or ()]


def language_parameters(model: Any) -> Iterator[nn.Parameter]:
    """Return the weights that text reaches: all those of a language model, and of a multimodal model the blocks of its
    language model and its head, without the layers that attend to an image."""
    part, skipped = language_model(model), image_layers(model)
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if name.startswith(f"{part}." if part else "") and not any(layer in name for layer in skipped):
            yield parameter
    if part and head is not None:
        yield from head.parameters()


def serving_names(model: Any, config: Any, task: Task) -> Renaming | None:
    """Return how the modules of a tuned model are called where it is served, None if the names are the same. `config` is
    that of the base model's folder."""
    if not is_wrapper(config) or is_wrapper(model.config):
        return None  # the whole model was tuned
    with torch.device("meta"):
        whole = served_class(config, task).from_config(config)
    found = find_renaming(
        ((name, type(module)) for name, module in model.named_modules()),
        ((name, type(module)) for name, module in whole.named_modules()),
    )
    return None if found is None or found.inner == found.outer else found
