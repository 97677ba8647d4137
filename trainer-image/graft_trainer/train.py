"""train: load the model, tokenise the dataset, resolve the values that the spec leaves open, and run the training
loop."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from graft.api.recipe import MethodName
from graft.contracts.progress import Reason
from graft.cpus import cpu_limit
from transformers import set_seed

from graft_trainer.checkpoints.checkpoint import identity
from graft_trainer.data.example import Example
from graft_trainer.data.packing import PackCollator, check_packing, pack
from graft_trainer.data.pod_tokens import tokenise_in_pod
from graft_trainer.data.read import read_data, without
from graft_trainer.data.tokens import Collator, Task, Tokenisation, pad_token
from graft_trainer.loop.loop import Work, run_loop
from graft_trainer.model.basemodel import context_of, load_config, load_tokenizer
from graft_trainer.model.methods import as_published, make_tunable, settle
from graft_trainer.model.model import BaseModel, load_base_model, stored_dtype, this_device
from graft_trainer.processes.distributed import world_size
from graft_trainer.recipe.resolve import Device, Resolved, limits, resolve
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Prepared, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What train returns: the tuned model, what it was trained on, and how training went."""

    model: Any  # the tuned model in eval mode, where it fits in memory; it has forward and generate with every method
    tokenizer: Any
    task: Task
    method: MethodName
    resolved: Resolved
    device: Device
    folder: Path  # of the base model
    stored: torch.dtype  # of the weights in that folder; a whole model is published with the same type
    targets: list[str]  # the modules with a low-rank update; empty for other methods
    digests: dict[str, str]
    train: Tokenisation
    train_examples: Sequence[Example]
    held_out: Tokenisation | None
    held_out_examples: Sequence[Example]
    curve: list[dict[str, float]]  # {step, loss, learningRate}
    held_out_curve: list[dict[str, float]]  # {step, evalLoss}, before the last step
    train_loss: float | None  # mean over the last tenth of the records
    tokens: int  # read in all steps
    learned_tokens: int  # the part of them that the loss covers
    context: int | None  # most tokens of a prompt and its answer together; virtual tokens are subtracted
    seconds: dict[str, float]
    peak_memory_bytes: int  # until the end of training: of one GPU, or without a GPU of the process
    open_base: Callable[[], AbstractContextManager[Any]]

    def base_model(self) -> AbstractContextManager[Any]:
        """Open the model without the training result, to measure it as the baseline.

        It is the tuned model with its adapter switched off. For `full`, it is the base model, loaded again and freed at
        the end.
        """
        return self.open_base()


def train(run: Run, prepared: Prepared) -> Trained:
    """Train the model on the prepared dataset. Return the tuned model and its training curves.

    With several processes, only rank 0 returns. The other ranks raise PartDone.
    """
    job, method, started = run.job, run.job.method, time.monotonic()
    torch.set_num_threads(cpu_limit())
    folder, name = Path(prepared.base_model_dir), job.base_model.name
    device, world, memory = this_device(), world_size(), PeakMemory()

    tokenizer = load_tokenizer(folder, name, job.job.created_at)
    config = load_config(folder, name)
    known = limits(job, device, context_of(config), world)
    data = read_data(job.dataset, run.settings.dataset_dir, job.training.seed)
    where: Any = {
        "task": job.task,
        "folder": run.settings.work_dir,
        "skip": job.dataset.on_invalid == "skip",
    }
    tokens = tokenise_in_pod(data.train, tokenizer, known.max_length, role="train", **where)
    held_out = None
    if data.held_out:
        held_out = tokenise_in_pod(data.held_out, tokenizer, known.max_length, role="eval", **where)
    items: Sequence[Any] = pack(tokens.examples, known.max_length) if job.training.packing else tokens.examples

    def load() -> BaseModel:
        return load_base_model(folder, name, job.task, method, known, device)

    set_seed(job.training.seed)
    base = load()
    check_vocabulary(base, tokens, name)
    if job.training.packing and base.loaded:
        check_packing(base.model, max(tokens.examples, key=lambda item: item.tokens), name)
    resolved = resolve(
        job,
        known,
        device,
        base.facts,
        examples=len(items),
        longest=known.max_length if job.training.packing else tokens.longest,
        held_out=held_out is not None,
        world=world,
        halvings=run.halvings,
    )
    stored = stored_dtype(config)
    tunable = make_tunable(job, base, folder, lambda: as_published(load().model, stored))
    context = _usable_context(base.facts.context, resolved)
    del base  # fsdp replaces the model's modules, and the old modules would keep their part of the weights in memory
    run.progress.update(
        total_steps=resolved.max_steps,
        training=resolved.wire(),
        target_modules=tunable.targets,
        unreached=tunable.unreached,
        trainable_parameters=tunable.trainable,
        total_parameters=tunable.total,
        world_size=world,
    )
    log.info(
        "%s on %d x %s, %s: %d steps of %d x %d examples each, %s of %s parameters trained%s",
        method.name,
        world,
        device.kind,
        resolved.precision,
        resolved.max_steps,
        resolved.gradient_accumulation_steps,
        resolved.per_device_train_batch_size,
        f"{tunable.trainable:,}",
        f"{tunable.total:,}",
        f", targets {', '.join(tunable.targets)}" if tunable.targets else "",
    )

    if tunable.unreached:
        log.warning("%s", tunable.unreached)

    loaded = time.monotonic()
    collate = PackCollator if job.training.packing else Collator
    collator = collate(pad_token(tokenizer), multiple=8 if device.kind == "cuda" else 1)
    of = identity(job, resolved, prepared.digests, len(items))
    learned = run_loop(run, Work(tunable.model, items, tokens.tokens, collator, held_out, resolved, device, of))
    peak = memory.peak_bytes()
    run.progress.update(peak_memory_bytes=peak)
    model = extract_model_from_parallel(tunable.model, keep_fp32_wrapper=False)
    settle(model, job, stored)
    last = learned.curve[-max(1, len(learned.curve) // 10) :]
    return Trained(
        model=model,
        tokenizer=tokenizer,
        task=job.task,
        method=method.name,
        resolved=resolved,
        device=device,
        folder=folder,
        stored=stored,
        targets=tunable.targets,
        digests=prepared.digests,
        train=tokens,
        train_examples=without(data.train, tokens.unusable.lines),
        held_out=held_out,
        held_out_examples=without(data.held_out, held_out.unusable.lines) if held_out else (),
        curve=learned.curve,
        held_out_curve=learned.held_out_curve,
        train_loss=sum(record["loss"] for record in last) / len(last) if last else None,
        tokens=learned.tokens,
        learned_tokens=learned.learned_tokens,
        context=context,
        seconds={"load": loaded - started, "train": time.monotonic() - loaded},
        peak_memory_bytes=peak,
        open_base=tunable.open_base,
    )


class PeakMemory:
    """The peak memory of this process: of its GPU, or without a GPU its resident memory."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        # Not getrusage(): its peak includes the process that started this one.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024  # kB


def _usable_context(context: int | None, resolved: Resolved) -> int | None:
    return context - (resolved.virtual_tokens or 0) if context is not None else None


def check_vocabulary(base: BaseModel, learned: Tokenisation, name: str) -> None:
    """Raise Failure if the tokenizer produces tokens without an embedding.

    A GPU would only report 'device-side assert'.
    """
    largest = max(item.largest for item in learned.examples)
    if largest >= base.facts.vocab_size:
        raise Failure(
            Reason.BASE_MODEL_INVALID,
            f"{name}: the tokenizer produces the token {largest}, but the model has embeddings for only {base.facts.vocab_size} tokens",
            "Put the tokenizer that belongs to the model into the BaseModel's source.",
        )
