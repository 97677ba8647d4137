"""The training loop: transformers' Trainer, with our order of the data, our checkpoints and our progress.

It knows nothing of methods: whatever of the model requires a gradient is trained.
"""

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch
from graft.artifacts.layout import run_prefix
from graft.contracts.progress import Reason
from transformers import PrinterCallback

from graft_trainer.checkpoints.checkpoint import identity
from graft_trainer.checkpoints.resume import Resume, find_resume
from graft_trainer.checkpoints.state import restore_weights, trained_weights
from graft_trainer.checkpoints.store import CheckpointStore, CheckpointWriter
from graft_trainer.data.tokens import Collator, Tokenisation
from graft_trainer.loop.lean_trainer import LeanTrainer, training_arguments
from graft_trainer.loop.watch import Watch
from graft_trainer.model import sharding
from graft_trainer.model.model import DTYPES
from graft_trainer.model.model_placement import place
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Device, Resolved
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Prepared, Run

log = logging.getLogger(__name__)


def run_loop(
    run: Run,
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    resolved: Resolved,
    device: Device,
    held_out: Tokenisation | None,
) -> Watch:
    """Train `model` in place, from the run's newest checkpoint on if there is one; what was seen on the way.

    Of several processes only the first comes back, with the whole model, in host memory where it was sharded; PartDone in the
    others.
    """
    distributed.loaded()
    watch = Watch(run.progress, run.interruption, resolved, collator, held_out, run.settings.checkpoint_seconds)
    checkpoints = CheckpointStore(
        run.store,
        run_prefix(run.job.tenant, run.job.job.uid),
        distributed.from_main(run.settings.attempt),  # pods that train together write below one prefix
        identity(run.job, resolved, Prepared.read(run.settings.prepared_file).digests, len(examples)),
        run.settings.work_dir / "checkpoints",
        upload=run.upload,
        limit=resolved.save_total_limit,
        patience=run.settings.storage_patience,
    )
    resume = find_resume(checkpoints, resolved, device, lambda found: run.progress.update(checkpoints=found))
    if resume is not None and resume.final:
        skip_loop(run, model, resume, watch)
    else:
        train_on(run, model, examples, resolved, device, watch, checkpoints, resume)
    collator.tokens = watch.tokens
    distributed.forget()
    watch.leaving = False  # whoever was asked to end has ended
    if watch.owes(resolved.max_steps):  # the last evaluation was broken off, and the final checkpoint written
        place(model)
        with torch.autocast(device.kind, DTYPES[resolved.precision], enabled=resolved.precision != "fp32"):
            watch.catch_up(model, resolved.max_steps)
    return watch


def skip_loop(run: Run, model: Any, resume: Resume, watch: Watch) -> None:
    """Take the weights of an attempt that ended after its last step: nothing is trained twice."""
    trained(run)
    log.info("an earlier attempt has trained to the end, step %d: going on from there", resume.step)
    restore_weights(model, resume.state["weights"])
    watch.restore(resume.state["watch"], resume.step)


def train_on(
    run: Run,
    model: Any,
    examples: Sequence[Any],
    resolved: Resolved,
    device: Device,
    watch: Watch,
    checkpoints: CheckpointStore,
    resume: Resume | None,
) -> None:
    """Train to the last step. Interrupted, or Failure(PeerLost), after a checkpoint when a pod was asked to end."""
    rank, world = distributed.rank(), distributed.world_size()
    if world > 1 and not distributed.joined():
        raise Failure(
            Reason.INTERNAL_ERROR,
            "the run's last checkpoint was there and is not any more, and the other pods have ended",
            "Delete the FineTuneJob and create it again.",
        )
    writer = CheckpointWriter(checkpoints, rank, world, lambda found: run.progress.update(checkpoints=found))
    watch.writer = writer
    run.interruption.hold(lambda: writer.busy)
    run.cleanup.callback(writer.wait)
    sharded = resolved.sharding == "fsdp"
    shell = sharding.shell(model) if sharded and rank == 0 else None
    with run.interruption.deferred():
        step = take_steps(run, model, examples, resolved, device, watch, writer, resume)
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
            gc.collect()  # the parts on this GPU are in cycles, too
        final = {"weights": trained_weights(model), "watch": watch.state()}
        # What was sharded is in host memory, which need not hold it twice: it is written before anything changes it.
        writer.take(final, step, final=True, copy=not sharded)
        if world > 1:
            # A pod that is started again must not need the others, which end now.
            writer.wait()
            if writer.error is not None:
                raise writer.error
            distributed.done()


def take_steps(
    run: Run,
    model: Any,
    examples: Sequence[Any],
    resolved: Resolved,
    device: Device,
    watch: Watch,
    writer: CheckpointWriter,
    resume: Resume | None,
) -> int:
    """Train `model` to the last step; its number. The Trainer ends with this function."""
    trainer = LeanTrainer(
        model=model,
        args=training_arguments(run.settings.work_dir, resolved, device),
        train_dataset=examples,
        data_collator=watch.collator,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.begin(watch, writer, resume)
    trainer.train(resume_from_checkpoint=resume and str(trainer.resume_folder(resume)))
    return int(trainer.state.global_step)


def trained(run: Run) -> None:
    """The last step is taken: what fails from here on is not for a smaller micro-batch to mend."""
    run.progress.stage("Evaluating", percent=100, eta_seconds=None)


def free_trainer() -> None:
    """Give back gradients and the optimizer's state, which are in a cycle with the Trainer: the GPU has no room for much else
    beside them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
