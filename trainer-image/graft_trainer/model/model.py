"""Load the base model from the local folder, in the form that the run's method and precision need.

Weights are read from safetensors only, and code from a model is never run.
"""

import inspect
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from graft.api.recipe import Method
from graft.contracts.progress import Reason
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from graft_trainer.data.tokens import Task
from graft_trainer.model import sharding
from graft_trainer.model.basemodel import context_of, load_config, stored_quantization
from graft_trainer.model.targets import Projection, Stacked
from graft_trainer.model.wrappers import image_layers, language_model, tuned_class
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Device, Limits, ModelFacts
from graft_trainer.run.failures import Failure, out_of_memory

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def this_device() -> Device:
    """Return this process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return Device("cpu")
    free, _ = torch.cuda.mem_get_info(torch.cuda.current_device())
    return Device("cuda", bf16=torch.cuda.is_bf16_supported(including_emulation=False), free_bytes=free)


@dataclass(frozen=True)
class BaseModel:
    """The loaded base model."""

    model: Any
    facts: ModelFacts
    projections: list[Projection]
    embeddings: list[Projection]  # the tables that the blocks read the tokens from
    loaded: bool = True  # False: its weights have no values yet, rank 0 sends them
    stacked: Stacked | None = None  # the experts of a mixture
    modules: list[str] = field(default_factory=list)  # the names of all modules
    quantized: bool = False  # its weights are integers, of which the method does not train any


def stored_dtype(config: Any) -> torch.dtype:
    """Return the type of the weights in the base model's files, as its config says. Whole tuned models are published in
    it."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_base_model(folder: Path, name: str, task: Task, method: Method, known: Limits, device: Device) -> BaseModel:
    """Load the base model: in 4 bits for qlora, in float32 for full. A model whose files are quantised already keeps its
    own form. Raises Failure(BaseModelInvalid) if it cannot be loaded or lacks weights.

    full keeps float32 weights for every precision (Micikevicius et al. 2018): at a learning rate of 2e-5, most updates
    are smaller than half of bfloat16's distance to the next number and would be lost. autocast computes the products in
    the precision. The frozen weights of the other methods are held in the precision itself.

    With fsdp, only rank 0 loads the weights, into host memory, and sends each rank its part. So the nodes need not hold
    the weights once per GPU.
    """
    arguments: dict[str, Any] = {"dtype": torch.float32 if method.full is not None else DTYPES[known.precision]}
    config = load_config(folder, name)
    stored = stored_quantization(config.to_dict())
    if method.qlora is not None and stored is None:
        compute = getattr(torch, known.compute_dtype or "float32")
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.qlora.quant_type,
            bnb_4bit_use_double_quant=method.qlora.double_quant,
            bnb_4bit_compute_dtype=compute,
        )
    loaded = known.sharding != "fsdp" or distributed.is_main() or not distributed.joined()
    if not loaded:
        arguments["device_map"] = {"": "meta"}
    # fsdp moves each rank's part to its GPU itself. The whole model may not fit there.
    elif known.sharding != "fsdp" and (device.kind == "cuda" or method.qlora is not None or stored):
        arguments["device_map"] = {"": torch.cuda.current_device() if device.kind == "cuda" else "cpu"}
    try:
        model, info = tuned_class(config, task).from_pretrained(
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
    if not loaded:
        sharding.hollow(model)
    if device.kind == "cpu":
        keep_differentiable(model)
    facts = facts_of(model, liger=device.kind == "cuda" and has_liger(model))
    return BaseModel(
        model,
        facts,
        projections_of(model),
        embeddings_of(model),
        loaded,
        stacked_of(model),
        [key for key, _ in model.named_modules()],
        quantized=method.qlora is not None or stored is not None,
    )


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16, its layers repack the weights permanently at their first call in eval mode. The kernel for
    that layout has no gradient. So training after an evaluation would use wrong gradients, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def has_liger(model: Any) -> bool:
    """Return whether Liger's kernels can be used for a model on this GPU.

    They cannot if the library leaves the division of the loss to the caller: the caller needs all logits for it, and
    Liger never holds them.
    """
    if not getattr(model, "accepts_loss_kwargs", True):
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # Liger's kernels need Triton, which compiles C code for the GPU here
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # the model also trains without Liger
        log.warning("Liger's kernels are not used, because Triton does not work here: %s", error)
        return False
    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def facts_of(model: Any, liger: bool = False) -> ModelFacts:
    text = model.config.get_text_config()
    return ModelFacts(
        context=context_of(model.config),
        layers=int(getattr(text, "num_hidden_layers", 1)),
        hidden_size=int(getattr(text, "hidden_size", 1)),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        parameters=int(model.num_parameters()),
        liger=liger,
    )


def projections_of(model: Any) -> list[Projection]:
    """Return the linear modules of the language model's blocks. The head is excluded: in many models it shares its weights
    with the embeddings. Layers that attend to an image are excluded: text never reaches them."""
    head, part, skipped = model.get_output_embeddings(), language_model(model), image_layers(model)
    found = []
    for name, module in model.named_modules():
        if module is head or (part and not name.startswith(f"{part}.")) or any(layer in name for layer in skipped):
            continue
        if isinstance(module, nn.Linear):  # bitsandbytes' layers are an nn.Linear, too, and keep the shape
            parent, _, leaf = name.rpartition(".")
            bypassed = f"self.{leaf}.weight" in _code(model.get_submodule(parent))
            found.append(Projection(name, module.in_features, module.out_features, bypassed))
        elif isinstance(module, Conv1D):  # GPT-2
            found.append(Projection(name, module.nx, module.nf))
    return found


def _code(block: nn.Module) -> str:
    """Return the source text of a state-space mixer (Mamba), "" for other blocks.

    These mixers pass the weights of some of their linear modules to a fused kernel. An update beside such a module then
    has no effect, and peft refuses some of them.
    """
    if not hasattr(block, "A_log"):
        return ""
    try:
        return inspect.getsource(type(block))
    except (OSError, TypeError):  # there is no source text
        return ""


def stacked_of(model: Any) -> Stacked | None:
    """Return the experts that transformers holds as stacked matrices, [expert, outputs, inputs] or [expert x outputs, inputs],
    None if there are none."""
    found = [
        (name.rpartition(".")[2] if key == "weight" else key, parameter.numel())
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not key.endswith("bias")
    ]
    return Stacked(sorted({key for key, _ in found}), sum(size for _, size in found)) if found else None


def embeddings_of(model: Any) -> list[Projection]:
    """Return the token embeddings that the model reads. T5's encoder and decoder have their own tables, which share the
    weights of a third table. The model never reads the third table, so an update of it would never be trained."""
    owner = model.get_input_embeddings()
    tables = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is owner.weight
    ]
    sharers = [(name, module) for name, module in tables if module is not owner]
    return [Projection(name, module.num_embeddings, module.embedding_dim) for name, module in sharers or tables]


def _cannot_load(name: str, what: str, error: Exception) -> Failure:
    return Failure(
        Reason.BASE_MODEL_INVALID,
        f"cannot load the {what} of {name}: {type(error).__name__}: {error}",
        "Point spec.source of the BaseModel at the complete folder of a language model that transformers supports, and set its "
        "spec.task to the task of this model.",
    )
