"""What each method trains of the base model, and how to get the original base model back.

The module takes a loaded base model and returns a model in which exactly the method's parameters require a gradient. It
knows nothing about data, steps or storage.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graft.api.recipe import Lora, PromptTuning, QLora
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
from graft_trainer.model.targets import target_modules, unreached
from graft_trainer.model.wrappers import language_parameters
from graft_trainer.run.failures import Failure

TASK_TYPES = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
BIASES = {"none": "none", "all": "all", "loraOnly": "lora_only"}  # the spec's value -> peft's value


@dataclass(frozen=True)
class Tunable:
    """The base model together with what the method adds to it."""

    model: Any
    targets: list[str]  # the modules with a low-rank update; empty for other methods
    trainable: int  # parameters
    total: int  # parameters, including those that were added
    open_base: Callable[[], AbstractContextManager[Any]]  # opens the model as it was before training
    unreached: str | None = None  # what the preset of target modules leaves out, in words


def make_tunable(job: JobFile, base: BaseModel, folder: Path, reload: Callable[[], Any]) -> Tunable:
    """Return the model that the method trains. The trained parameters are float32. `folder` holds the base model's
    tokenizer. `reload` loads the base model a second time, for `full`."""
    method, targets, missed = job.method, list[str](), None
    before = {id(parameter) for parameter in base.model.parameters()}
    if method.low_rank is not None:
        targets = target_modules(method.low_rank, base.projections, base.embeddings, base.modules, base.stacked)
        missed = unreached(method.low_rank, base.stacked, base.facts.parameters)
        model = with_lora(base.model, method.low_rank, targets, job.task, quantized=base.quantized)
    elif method.prompt_tuning is not None:
        model = _with_prompt(base.model, method.prompt_tuning, job.task, folder)
    else:
        model = base.model
        model.requires_grad_(False)
        for parameter in language_parameters(model):
            parameter.requires_grad = True
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _, parameter in trained:
        # Small updates are lost in 16 bits. peft converts its own weights, but not the base model's biases.
        parameter.data = parameter.data.float()
    if method.full is not None:
        open_base = lambda: _loaded_again(reload)  # noqa: E731
    else:
        # peft disables what it has added. Biases that were trained in place are restored from `original`.
        original = {name: parameter.detach().clone() for name, parameter in trained if id(parameter) in before}
        open_base = lambda: _switched_off(model, original)  # noqa: E731
    return Tunable(
        model,
        targets,
        trainable=sum(parameter.numel() for _, parameter in trained),
        total=base.facts.parameters + sum(p.numel() for _, p in trained if id(p) not in before),
        open_base=open_base,
        unreached=missed,
    )


def settle(model: Any, job: JobFile, stored: torch.dtype) -> None:
    """Bring the trained model into its published form and move it to a device where it fits: the model that is measured
    from here on is the model that is served. Biases that were trained beside an adapter get the type of their module's
    weights again."""
    if job.method.low_rank is not None and job.method.low_rank.bias != "none":
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if not isinstance(bias, torch.nn.Parameter) or not bias.requires_grad or weight is None:
                continue
            if weight.is_floating_point():  # 4-bit weights are integers, and their layers accept a bias of any type
                bias.data = bias.data.to(weight.dtype)
    model.requires_grad_(False)
    model.eval()
    if job.method.full is not None:
        as_published(model, stored)
    else:
        place(model)


def as_published(model: Any, stored: torch.dtype) -> Any:
    """Round a whole model to the type of the base model's files, move it to a device where it fits, and return it. On a
    CPU, the rounded weights are then held in float32 for computing.

    Buffers are not rounded: transformers keeps the frequencies of rotary positions in float32 for every type of
    weights.
    """
    cast_parameters(model, stored)
    place(model)
    if model.device.type == "cpu":
        cast_parameters(model, torch.float32)
    return model


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Change the type of the parameters in place. Parameters that share their memory still share it afterwards."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def with_lora(
    model: Any, lora: Lora, targets: list[str], task: Task, *, quantized: bool, without_values: bool = False
) -> Any:
    """Return the model with a trainable low-rank update. Raises Failure(ConfigurationInvalid) if peft refuses a target. If
    `without_values`, the update is on the meta device."""
    if quantized:
        # The Trainer switches gradient checkpointing on. peft's kind here would recompute everything twice.
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
            # peft warns about merging an update into shared embeddings, which is not done here.
            warnings.simplefilter("ignore", UserWarning)
            tunable = get_peft_model(model, config, low_cpu_mem_usage=without_values)
    except ValueError as error:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"cannot add the adapter to the model: {error}",
            f"Set spec.method.{'qlora' if isinstance(lora, QLora) else 'lora'}.targetModules to the preset all-linear instead of naming "
            "modules.",
        ) from error
    for name, parameter in tunable.named_parameters():
        if parameter.requires_grad and "lora_" not in name and not name.endswith(".bias"):
            parameter.requires_grad = False  # peft treats T5's table relative_attention_bias as a bias
    return tunable


def _with_prompt(model: Any, prompt: PromptTuning, task: Task, folder: Path) -> Any:
    """Add trainable vectors before the (encoder's) input. Without initText they start as the embeddings of random
    words. Lester et al. 2021 (section 3.2) found these far better than random numbers for all but the largest
    models."""
    text = prompt.init_text
    config = PromptTuningConfig(
        task_type=TASK_TYPES[task],
        num_virtual_tokens=prompt.virtual_tokens,
        num_transformer_submodules=1,  # only the encoder, as in the paper; peft would also prompt the decoder
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
                warnings.simplefilter("ignore", UserWarning)  # about trained biases, which are restored here
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
