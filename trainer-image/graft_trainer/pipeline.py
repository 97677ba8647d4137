"""train's container: train, evaluate, publish, or nothing when another attempt has published the version already; then
the run's checkpoints go."""

import logging
import warnings
from contextlib import suppress

from graft.artifacts.layout import run_prefix
from graft.artifacts.store import StoreError, patiently

from graft_trainer.checkpoints.checkpoint import Checkpoint, all_of_run, complete
from graft_trainer.processes import distributed
from graft_trainer.run.failures import Failure, Interrupted
from graft_trainer.run.run import Prepared, Run, already_published, memory_halvings

log = logging.getLogger(__name__)


def train_evaluate_publish(run: Run) -> None:
    """The life of an attempt after prepare."""
    if done_by_another(run):
        return
    if distributed.world_size() > 1:
        if not trained_to_the_end(run):
            try:
                distributed.join()
            except Failure:
                if published_meanwhile(run):
                    return
                raise
        elif not distributed.is_main():
            return  # the first process goes on alone
    run.progress.stage("Training", dataset=Prepared.read(run.settings.prepared_file).statistics)
    run.halvings = distributed.from_main(patiently(lambda: memory_halvings(run), run.settings.storage_patience))
    quieten()
    # Imported here because torch takes seconds to load, and a published version needs none of it.
    from graft_trainer.evaluation.evaluate import evaluate
    from graft_trainer.train import train

    try:
        trained = train(run)
    except distributed.PartDone:
        return
    except Failure:
        if published_meanwhile(run):
            return
        raise
    evaluated = evaluate(run, trained)
    from graft_trainer.versions.publish import (
        publish,  # with matplotlib, whose first import takes seconds that a GPU would wait
    )

    publish(run, trained, evaluated)
    remove_checkpoints(run)


def published_meanwhile(run: Run) -> bool:
    """Whether this attempt fails because another has published, and removed the checkpoints that this one wanted to go on
    from."""
    with suppress(StoreError, Failure):
        return done_by_another(run)
    return False


def done_by_another(run: Run) -> bool:
    """Whether another attempt of the job has published the version: this one says so, and what that one left is removed."""
    if (published := already_published(run)) is None:
        return False
    manifest, digest = published
    log.info("%s %s was published by another attempt: done", manifest.adapter, manifest.version)
    run.progress.stage(
        "Succeeded",
        percent=100,
        metrics=manifest.metrics,
        rejected=manifest.rejected or None,
        training=manifest.hyperparameters,
        target_modules=manifest.target_modules,
        manifest_digest=digest,
    )
    if distributed.is_main():
        remove_checkpoints(run)
    return True


def remove_checkpoints(run: Run) -> None:
    """Delete all checkpoints of a run whose version is published: nobody goes on from them any more. The version is out, so
    what fails here is only told; what is left goes with the FineTuneJob."""
    run.cleanup.close()  # a checkpoint of this attempt may still be on its way
    root = run_prefix(run.job.tenant, run.job.job.uid)
    left: list[Checkpoint] | None = None

    def remove() -> None:
        nonlocal left
        objects = list(run.store.objects(root))
        left = complete(objects, root, lambda item: run.store.get(item.key))
        for key in all_of_run(objects, root):
            run.store.delete(key)
            left = [one for one in left if not key.startswith(root + one.prefix)]

    try:
        with suppress(Interrupted), run.interruption.deferred():
            patiently(remove, run.settings.storage_patience)
    except Exception as error:
        log.warning("the run's checkpoints could not be removed, they go with the FineTuneJob: %s", error)
    if left is not None:
        run.progress.update(checkpoints=[checkpoint.ref() for checkpoint in left])


def trained_to_the_end(run: Run) -> bool:
    """Whether an earlier attempt has left its weights after the last step."""
    root = run_prefix(run.job.tenant, run.job.job.uid)

    def look() -> bool:
        found = complete(run.store.objects(root), root, lambda item: run.store.get(item.key))
        return any(checkpoint.final for checkpoint in found)

    return patiently(look, run.settings.storage_patience)


def quieten() -> None:
    """Leave the log to the run: no progress bars and no advice that is meant for the libraries' callers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
