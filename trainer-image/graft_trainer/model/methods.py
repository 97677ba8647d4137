"""What each method trains of the base model, and how to get the base model back.

It knows nothing about data, steps or storage: it takes a loaded base model and gives the model whose parameters that
require a gradient are the method's.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graft.api.recipe import Lora, PromptTuning
from graft.contracts.job import JobFile
from graft.contracts.progress import Reason
from peft import (
    LoraConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from graft_trainer.data.tokens import Task
from graft_trainer.model.model import BaseModel
from graft_trainer.model.model_placement import place, release
from graft_trainer.model.targets import target_modules
from graft_trainer.run.failures import Failure

TASK_TYPES = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
BIASES = {"none": "none", "all": "all", "loraOnly": "lora_only"}  # the spec's word -> peft's


@dataclass(frozen=True)
class Tunable:
    """The base model with what the method adds to it."""

    model: Any
    targets: list[str]  # the modules with a low-rank update; empty for other methods
    trainable: int  # parameters
    total: int  # parameters, those that were added included
    open_base: Callable[[], AbstractContextManager[Any]]  # the model as it was before training


def make_tunable(job: JobFile, base: BaseModel, folder: Path, reload: Callable[[], Any]) -> Tunable:
    """The model that the method trains, in float32 where it is trained. `folder` holds the base model's tokenizer,
    `reload` loads the base model a second time, for `full`."""
    method, targets = job.method, []
    before = {id(parameter) for parameter in base.model.parameters()}
    if method.low_rank is not None:
        targets = target_modules(method.low_rank, base.projections, base.embeddings)
        model = _with_lora(base.model, method.low_rank, targets, job.task, quantized=method.qlora is not None)
    elif method.prompt_tuning is not None:
        model = _with_prompt(base.model, method.prompt_tuning, job.task, folder)
    else:
        model = base.model
        model.requires_grad_(True)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _, parameter in trained:
        # Small updates are lost in 16 bits. peft sees to its own weights, the base model's biases remain.
        parameter.data = parameter.data.float()
    if method.full is not None:
        open_base = lambda: _loaded_again(reload)  # noqa: E731
    else:
        # peft switches off what it has added; biases that were trained in place are put back by us.
        original = {name: parameter.detach().clone() for name, parameter in trained if id(parameter) in before}
        open_base = lambda: _switched_off(model, original)  # noqa: E731
    return Tunable(
        model,
        targets,
        trainable=sum(parameter.numel() for _, parameter in trained),
        total=base.facts.parameters + sum(p.numel() for _, p in trained if id(p) not in before),
        open_base=open_base,
    )


def settle(model: Any, job: JobFile, stored: torch.dtype) -> None:
    """Leave the trained model as it is published, and where it fits: what is measured from here on is what is served. Biases
    that were trained beside an adapter go back to the type of the weights that they belong to."""
    if job.method.low_rank is not None and job.method.low_rank.bias != "none":
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if not isinstance(bias, torch.nn.Parameter) or not bias.requires_grad or weight is None:
                continue
            if weight.is_floating_point():  # 4-bit weights are not, and their layers take any bias
                bias.data = bias.data.to(weight.dtype)
    model.requires_grad_(False)
    model.eval()
    if job.method.full is not None:
        as_published(model, stored)
    else:
        place(model)


def as_published(model: Any, stored: torch.dtype) -> Any:
    """A whole model rounded to the type of the base model's files, where it fits; on a CPU it is computed with in float32
    all the same.

    Buffers stay: transformers keeps the frequencies of rotary positions in float32 whatever the weights' type.
    """
    cast_parameters(model, stored)
    place(model)
    if model.device.type == "cpu":
        cast_parameters(model, torch.float32)
    return model


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Change the type of the parameters in place; those that share their memory go on sharing it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _with_lora(model: Any, lora: Lora, targets: list[str], task: Task, *, quantized: bool) -> Any:
    if quantized:
        # Checkpointing is the Trainer's to switch on; here it would be the kind that recomputes everything twice.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type=TASK_TYPES[task],
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2.0 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias=BIASES[lora.bias],
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # on merging an update into shared embeddings, which nobody does
            tunable = get_peft_model(model, config)
    except ValueError as error:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the adapter cannot be put on the model: {error}",
            "Use the preset all-linear or attention in targetModules.",
        ) from error
    for name, parameter in tunable.named_parameters():
        if parameter.requires_grad and "lora_" not in name and not name.endswith(".bias"):
            parameter.requires_grad = False  # peft takes T5's table relative_attention_bias for a bias
    return tunable


def _with_prompt(model: Any, prompt: PromptTuning, task: Task, folder: Path) -> Any:
    """Vectors before the (encoder's) input. Without a text they start as the embeddings of random words, which Lester et
    al. 2021 (section 3.2) found far better than random numbers for all but the largest models."""
    text = prompt.init_text
    config = PromptTuningConfig(
        task_type=TASK_TYPES[task],
        num_virtual_tokens=prompt.virtual_tokens,
        num_transformer_submodules=1,  # the encoder alone, as in the paper; peft would prompt the decoder, too
        prompt_tuning_init=PromptTuningInit.TEXT if text is not None else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(folder) if text is not None else None,
        tokenizer_kwargs={"local_files_only": True} if text is not None else None,
    )
    return get_peft_model(model, config)


@contextmanager
def _switched_off(model: Any, original: dict[str, torch.Tensor]) -> Iterator[Any]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in original}
    learned = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = original[name].to(parameter.device, parameter.dtype)
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # on trained biases, which are put back here
                stack.enter_context(model.disable_adapter())
            yield model
    finally:
        for name, parameter in parameters.items():
            parameter.data = learned[name]


@contextmanager
def _loaded_again(reload: Callable[[], Any]) -> Iterator[Any]:
    model = reload()
    model.eval()
    try:
        yield model
    finally:
        release(model)
