"""Which class of transformers holds the base model, and what an adapter's modules are called in it."""

from __future__ import annotations

from typing import Any

import torch
from graft.artifacts.modulenames import Renaming, find_renaming
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def class_of(config: Any) -> Any:
    """Return the auto class to load. Of a multimodal model it is the language model alone, if transformers has a class for
    it."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get_text_config() is config
    return AutoModelForCausalLM if alone else AutoModelForImageTextToText


def names_of(network: Any, config: Any) -> Renaming:
    """Return how adapters call the modules of a network. `config` is that of the base model's folder.

    Adapters of a multimodal model have the names of the whole model, as vLLM builds it. The network may be its language
    model alone.
    """
    whole = config.get_text_config() is not config
    named = set(config.architectures or ()) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    if not whole or not named or type(network).__name__ in named:
        return Renaming()
    with torch.device("meta"):
        outer = AutoModelForImageTextToText.from_config(config)
    found = find_renaming(
        ((name, type(module)) for name, module in network.named_modules()),
        ((name, type(module)) for name, module in outer.named_modules()),
    )
    return found or Renaming()
