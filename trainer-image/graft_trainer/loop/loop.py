"""The training loop: transformers' Trainer with Graft's order of the data, checkpoints and progress.

It knows nothing about methods: it trains every parameter that requires a gradient.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graft.contracts.progress import CheckpointRef, Reason
from transformers import PrinterCallback

from graft_trainer.checkpoints.resume import Resume, find_resume
from graft_trainer.checkpoints.state import restore_weights, trained_weights
from graft_trainer.checkpoints.store import CheckpointStore, CheckpointWriter
from graft_trainer.data.tokens import Collator, Tokenisation
from graft_trainer.loop.lean_trainer import LeanTrainer, training_arguments
from graft_trainer.loop.watch import Watch
from graft_trainer.model import sharding
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Device, Resolved, steps_per_epoch
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What the loop trains, on what, and by which values."""

    model: Any
    examples: Sequence[Any]
    tokens: int  # of all examples
    collator: Collator
    held_out: Tokenisation | None
    resolved: Resolved
    device: Device
    identity: str  # of the run; only checkpoints with the same identity are resumed from


@dataclass(frozen=True)
class Learned:
    """What the loop returns, beside the model, which it trains in place."""

    curve: list[dict[str, float]]  # {step, loss, learningRate}
    held_out_curve: list[dict[str, float]]  # {step, evalLoss}
    tokens: int  # read in all steps, by all ranks, including earlier attempts
    learned_tokens: int  # the part of them that the loss covers
    seconds: float  # of training, including earlier attempts


def run_loop(run: Run, work: Work) -> Learned:
    """Train `work.model` in place. If the store has a usable checkpoint of the run, training resumes from the newest
    one.

    With several processes, only rank 0 returns. The other ranks raise PartDone. If the model was sharded, it is
    unsharded and in host memory when this returns.
    """
    distributed.loaded()
    resolved = work.resolved
    checkpoints = CheckpointStore(
        run.store,
        run.prefix,
        distributed.from_main(run.settings.attempt),  # pods that train together write below one prefix
        work.identity,
        run.settings.work_dir / "checkpoints",
        upload=run.upload,
        limit=resolved.save_total_limit,
    )

    def report(found: list[CheckpointRef]) -> None:
        run.progress.update(checkpoints=found)

    writer = CheckpointWriter(checkpoints, distributed.rank(), distributed.world_size(), report)
    steps = steps_per_epoch(
        len(work.examples),
        resolved.per_device_train_batch_size,
        resolved.gradient_accumulation_steps,
        resolved.world_size,
    )
    watch = Watch(
        run.progress,
        run.interruption,
        resolved,
        work.collator,
        work.held_out,
        writer,
        run.settings.checkpoint_seconds,
        work.tokens / steps,
    )
    resume = find_resume(checkpoints, resolved, work.device, report)
    if resume is not None and resume.final:
        skip_loop(run, work.model, resume, watch)
    else:
        train_on(run, work, watch, writer, resume)
    distributed.forget()
    return Learned(watch.curve, watch.held_out_curve(), watch.tokens, watch.learned_tokens, watch.seconds)


def skip_loop(run: Run, model: Any, resume: Resume, watch: Watch) -> None:
    """Restore the weights of an earlier attempt that ended after its last step. No step is trained again."""
    trained(run)
    log.info("an earlier attempt has trained to the end, step %d: resuming after it", resume.step)
    restore_weights(model, resume.state["weights"])
    watch.restore(resume.state["watch"], resume.step)


def train_on(run: Run, work: Work, watch: Watch, writer: CheckpointWriter, resume: Resume | None) -> None:
    """Train to the last step. If a pod is interrupted, every rank writes a checkpoint and raises Interrupted or
    Failure(PeerLost)."""
    rank, world = distributed.rank(), distributed.world_size()
    if world > 1 and not distributed.joined():
        raise Failure(
            Reason.INTERNAL_ERROR,
            "the run's last checkpoint existed and is now gone, and the other pods have ended",
            "Delete the FineTuneJob and create it again.",
        )
    run.interruption.hold(lambda: writer.busy)
    run.cleanup.callback(writer.wait)
    model, sharded = work.model, work.resolved.sharding == "fsdp"
    shell = sharding.shell(model) if sharded and rank == 0 else None
    with run.interruption.deferred():
        step = take_steps(run, work, watch, writer, resume)
        trained(run)
        free_trainer()
        whole = sharding.gather(model, keep=rank == 0) if sharded else None
        distributed.leave()
        if rank > 0:
            distributed.until_done()
            raise distributed.PartDone
        if whole is not None and shell is not None:
            sharding.refill(model, shell, whole)
            del whole, shell
            gc.collect()  # the shards on this GPU are in reference cycles, too
        final = {"weights": trained_weights(model), "watch": watch.state()}
        # A sharded model is in host memory now. Host memory may be too small for a second copy, so the checkpoint is
        # written without one, before the model changes.
        writer.take(final, step, final=True, copy=not sharded)
        if world > 1:
            # The other pods end now. If this pod is restarted, it must not need them.
            writer.wait()
            if writer.error is not None:
                raise writer.error
            distributed.done()


def take_steps(run: Run, work: Work, watch: Watch, writer: CheckpointWriter, resume: Resume | None) -> int:
    """Train to the last step and return its number. The Trainer and its optimizer are freed when this returns."""
    trainer = LeanTrainer(
        model=work.model,
        args=training_arguments(run.settings.work_dir, work.resolved, work.device),
        train_dataset=work.examples,
        data_collator=watch.collator,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.begin(watch, writer, resume)
    trainer.train(resume_from_checkpoint=resume and str(trainer.resume_folder(resume)))
    return int(trainer.state.global_step)


def trained(run: Run) -> None:
    """Report that the last step is done. From here on, a smaller micro-batch cannot help if memory runs out."""
    run.progress.stage("Evaluating", percent=100, eta_seconds=None)


def free_trainer() -> None:
    """Free the gradients and the optimizer's state, which take most of the GPU's memory.

    They are in a reference cycle with the Trainer, so only the garbage collector frees them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
