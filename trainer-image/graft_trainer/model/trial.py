"""Try the method on the base model's module tree, without a GPU and without weights: is there everything that it names, and
does peft accept it?"""

import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from graft.api.recipe import Method

from graft_trainer.data.tokens import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What a method would train of a base model."""

    targets: list[str] = field(default_factory=list)  # the modules that get a low-rank update
    unreached: str | None = None  # what a preset leaves out, in words


def try_method(folder: Path, name: str, task: Task, method: Method) -> Trial:
    """Build the model of `folder`/config.json with the method. Raises Failure if that fails.

    It runs in a process of its own: prepare's other checks need no torch, and the memory is free again afterwards.
    """
    if sys.modules.get("torch") is not None:
        return _try(folder, name, task, method)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_try_alone, folder, name, task, method).result()


def _try_alone(folder: Path, name: str, task: Task, method: Method) -> Trial:
    # peft would import it, and it imports torch's compiler, which takes seconds.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    return _try(folder, name, task, method)


def _try(folder: Path, name: str, task: Task, method: Method) -> Trial:
    from graft_trainer.model.methods import with_lora
    from graft_trainer.model.model import embeddings_of, projections_of, stacked_of
    from graft_trainer.model.shapes import base_of_shapes
    from graft_trainer.model.targets import target_modules, unreached

    model = base_of_shapes(folder, name, task, served=False)
    if (lora := method.low_rank) is None:
        return Trial()
    stacked, parameters = stacked_of(model), sum(parameter.numel() for parameter in model.parameters())
    names = [key for key, _ in model.named_modules()]
    targets = target_modules(lora, projections_of(model), embeddings_of(model), names, stacked)
    with_lora(model, lora, targets, task, quantized=False, without_values=True)
    return Trial(targets, unreached(lora, stacked, parameters))
