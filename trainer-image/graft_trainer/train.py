"""train: load, tokenise, resolve what the spec leaves open, and run transformers' Trainer over the adapter's weights."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graft.api.recipe import Lora
from graft.contracts import Reason
from graft.cpus import cpu_limit
from transformers import AutoConfig, set_seed

from graft_trainer.dataset import Example
from graft_trainer.failures import Failure
from graft_trainer.loop import run_loop
from graft_trainer.model import BaseModel, add_adapter, context_of, load_base_model, load_tokenizer, this_device
from graft_trainer.resolve import Device, Resolved, limits, resolve
from graft_trainer.run import Prepared, Run, load_examples
from graft_trainer.targets import target_modules
from graft_trainer.tokens import Collator, Tokenisation, pad_token, tokenise

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The adapter on its base model, and how it came to be."""

    model: Any
    tokenizer: Any
    resolved: Resolved
    device: Device
    targets: list[str]
    digests: dict[str, str]
    train: Tokenisation
    held_out: Tokenisation | None
    held_out_examples: list[Example]
    curve: list[dict[str, float]]
    train_loss: float | None  # mean over the last tenth of the records
    eval_loss: float | None  # when it was measured after the last step
    tokens: int
    context: int | None
    seconds: dict[str, float]


def train(run: Run) -> Trained:
    """Learn the adapter."""
    job, method, started = run.job, run.job.method, time.monotonic()
    torch.set_num_threads(cpu_limit())
    prepared = Prepared.read(run.settings.prepared_file)
    folder, name, device = Path(prepared.base_model_dir), job.base_model.name, this_device()

    tokenizer = load_tokenizer(folder, name)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    known = limits(job.training, method, device, context_of(config))
    train_examples, held_out_examples = load_examples(run)
    learned = tokenise(train_examples, tokenizer, known.max_length, role="train")
    held_out = tokenise(held_out_examples, tokenizer, known.max_length, role="eval") if held_out_examples else None

    set_seed(job.training.seed)
    base = load_base_model(folder, name, method, known, device)
    check_vocabulary(base, learned, name)
    resolved = resolve(
        job.training,
        method,
        known,
        device,
        base.facts,
        examples=len(learned.examples),
        longest=learned.longest,
        held_out=held_out is not None,
    )
    targets = target_modules(method.low_rank or Lora(), base.projections)
    model = add_adapter(base, method.low_rank or Lora(), targets, resolved.alpha, resolved.gradient_checkpointing)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run.progress.update(
        total_steps=resolved.max_steps,
        training=resolved.wire(),
        target_modules=targets,
        trainable_parameters=trainable,
        total_parameters=base.facts.parameters + trainable,
    )
    log.info(
        "%s on %s, %s: %d steps of %d x %d examples, %s of %s parameters trained, targets %s",
        method.name,
        device.kind,
        resolved.precision,
        resolved.max_steps,
        resolved.gradient_accumulation_steps,
        resolved.per_device_train_batch_size,
        f"{trainable:,}",
        f"{base.facts.parameters:,}",
        ", ".join(targets),
    )

    loaded = time.monotonic()
    collator = Collator(pad_token(tokenizer), multiple=8 if device.kind == "cuda" else 1)
    watch = run_loop(run, model, learned.examples, collator, resolved, device, held_out)
    last = watch.curve[-max(1, len(watch.curve) // 10) :]
    return Trained(
        model=model,
        tokenizer=tokenizer,
        resolved=resolved,
        device=device,
        targets=targets,
        digests=prepared.digests,
        train=learned,
        held_out=held_out,
        held_out_examples=held_out_examples,
        curve=watch.curve,
        train_loss=sum(record["loss"] for record in last) / len(last) if last else None,
        eval_loss=watch.last_eval_loss,
        tokens=collator.tokens,
        context=base.facts.context,
        seconds={"load": loaded - started, "train": time.monotonic() - loaded},
    )


def check_vocabulary(base: BaseModel, learned: Tokenisation, name: str) -> None:
    """Failure when the tokenizer makes tokens that the model has no embedding for; a GPU would only say 'device-side assert'."""
    largest = max(max(item.input_ids) for item in learned.examples)
    if largest >= base.facts.vocab_size:
        raise Failure(
            Reason.BASE_MODEL_INVALID,
            f"{name}: the tokenizer makes token {largest}, the model has embeddings for {base.facts.vocab_size}",
            "Use the tokenizer that belongs to the model.",
        )
