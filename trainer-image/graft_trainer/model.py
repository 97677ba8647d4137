"""The base model and the adapter on it, loaded from the local folder with what the run's precision asks for."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graft.api.recipe import Lora, Method, QLora
from graft.contracts import Reason
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from graft_trainer.failures import Failure, out_of_memory
from graft_trainer.resolve import Device, Limits, ModelFacts
from graft_trainer.targets import Projection

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def this_device() -> Device:
    """The first GPU, or the CPU."""
    if not torch.cuda.is_available():
        return Device("cpu")
    if torch.cuda.device_count() > 1:
        log.warning("%d GPUs are here, one is used", torch.cuda.device_count())
    free, _ = torch.cuda.mem_get_info(0)
    return Device("cuda", bf16=torch.cuda.is_bf16_supported(including_emulation=False), free_bytes=free)


@dataclass(frozen=True)
class BaseModel:
    """The base model as it was loaded."""

    model: Any
    facts: ModelFacts
    projections: list[Projection]


def load_tokenizer(folder: Path, name: str) -> Any:
    """The base model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _cannot_load(name, "tokenizer", error) from error


def context_of(config: Any) -> int | None:
    """Longest sequence that the model was made for, in tokens."""
    text = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, field, None), int) and value > 0:
            return value
    return None


def load_base_model(folder: Path, name: str, method: Method, known: Limits, device: Device) -> BaseModel:
    """The base model, in 4 bits for qlora. Failure(BaseModelInvalid) when it cannot be loaded or lacks weights."""
    arguments: dict[str, Any] = {"dtype": DTYPES[known.precision]}
    if method.qlora is not None:
        compute = getattr(torch, known.compute_dtype or "float32")
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.qlora.quant_type,
            bnb_4bit_use_double_quant=method.qlora.double_quant,
            bnb_4bit_compute_dtype=compute,
        )
    if device.kind == "cuda" or method.name == "qlora":
        arguments["device_map"] = {"": 0 if device.kind == "cuda" else "cpu"}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **arguments
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise _cannot_load(name, "weights", error) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info.get(problem) or ()):
            raise Failure(
                Reason.BASE_MODEL_INVALID,
                f"{name}: {len(keys)} weights are {problem.partition('_')[0]}, the first is {keys[0]}",
                "Upload weights that belong to the model's config.json.",
            )
    if device.kind == "cpu":
        keep_differentiable(model)
    return BaseModel(model, facts_of(model), projections_of(model))


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 its layers do so at their first call in eval mode, and for good; the kernel for that layout
    has no gradient, so whatever is trained after an evaluation would learn from wrong gradients, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def facts_of(model: Any) -> ModelFacts:
    text = model.config.get_text_config()
    return ModelFacts(
        context=context_of(model.config),
        layers=int(getattr(text, "num_hidden_layers", 1)),
        hidden_size=int(getattr(text, "hidden_size", 1)),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        parameters=int(model.num_parameters()),
    )


def projections_of(model: Any) -> list[Projection]:
    """The linear modules of the blocks: all but the head, which shares its weights with the embeddings in many models."""
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):  # bitsandbytes' 4-bit layer is one, too, and keeps its shape
            found.append(Projection(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):  # GPT-2
            found.append(Projection(name, module.nx, module.nf))
    return found


def add_adapter(base: BaseModel, lora: Lora, targets: list[str], alpha: float, checkpointing: bool) -> Any:
    """The model with a fresh adapter, the only part of it that is trained."""
    model = base.model
    if isinstance(lora, QLora):
        # Checkpointing is the Trainer's to switch on; here it would be the kind that recomputes everything twice.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the adapter cannot be put on the model: {error}",
            "Use the preset all-linear or attention in targetModules.",
        ) from error


def _cannot_load(name: str, what: str, error: Exception) -> Failure:
    return Failure(
        Reason.BASE_MODEL_INVALID,
        f"the {what} of {name} cannot be loaded: {type(error).__name__}: {error}",
        "Point the BaseModel at a whole folder of a causal language model that transformers supports.",
    )
