"""train's container: train, evaluate, publish. It does nothing if another attempt has published the version already."""

import logging
import warnings
from contextlib import suppress

from graft.artifacts.manifest import Manifest
from graft.artifacts.storage import StoreError

from graft_trainer.checkpoints.checkpoint import Checkpoint, Receipt, all_of_run, complete
from graft_trainer.processes import distributed
from graft_trainer.run.earlier import already_published, memory_halvings
from graft_trainer.run.failures import Failure, Interrupted
from graft_trainer.run.run import Prepared, Run

log = logging.getLogger(__name__)


def train_evaluate_publish(run: Run) -> None:
    """Run the stages after prepare. Each stage takes the result of the stage before it."""
    if done_by_another(run):
        return
    try:
        if not join_others(run):
            return
        prepared = Prepared.read(run.settings.prepared_file)
        run.progress.stage("Training", dataset=prepared.statistics)
        run.halvings = distributed.from_main(memory_halvings(run))
        quieten()
        # Imported here because torch takes seconds to load, and an attempt after a published version does not need it.
        from graft_trainer.evaluation.evaluate import evaluate
        from graft_trainer.train import train

        trained = train(run, prepared)
    except distributed.PartDone:
        return
    except Failure:
        if published_meanwhile(run):
            return
        raise
    evaluated = evaluate(run, trained)
    # Imported here because it imports matplotlib. The first import takes seconds, and the GPU would wait for it.
    from graft_trainer.versions.publish import publish

    manifest, digest = publish(run, trained, evaluated)
    report_success(run, manifest, digest)
    remove_checkpoints(run)


def join_others(run: Run) -> bool:
    """Join the other processes of the run if there are any. Return whether this process has anything to do.

    After the last step rank 0 evaluates and publishes alone. If an earlier attempt got that far, the other ranks end at
    once.
    """
    if distributed.world_size() == 1:
        return True
    if trained_to_the_end(run):
        return distributed.is_main()
    distributed.join()
    return True


def published_meanwhile(run: Run) -> bool:
    """Return whether another attempt has published the version.

    It may have deleted the checkpoints that this one needed.
    """
    with suppress(StoreError, Failure):
        return done_by_another(run)
    return False


def done_by_another(run: Run) -> bool:
    """Return whether another attempt of the job has published the version.

    If so, report it and delete the checkpoints.
    """
    if (published := already_published(run)) is None:
        return False
    manifest, digest = published
    log.info("%s %s was published by another attempt, so this run is complete", manifest.adapter, manifest.version)
    report_success(run, manifest, digest)
    if distributed.is_main():
        remove_checkpoints(run)
    return True


def report_success(run: Run, manifest: Manifest, digest: str) -> None:
    """Report the published version in progress.json. Another attempt may have published it."""
    run.progress.stage(
        "Succeeded",
        percent=100,
        metrics=manifest.metrics,
        rejected=manifest.rejected or None,
        training=manifest.hyperparameters,
        target_modules=manifest.target_modules,
        manifest_digest=digest,
    )


def remove_checkpoints(run: Run) -> None:
    """Delete all checkpoints of a run whose version is published: no attempt resumes from them any more.

    The version is published, so a failure here is only logged. The remaining checkpoints are deleted with the
    FineTuneJob.
    """
    run.cleanup.close()  # waits for a checkpoint of this attempt that is still being uploaded
    left: list[Checkpoint] | None = None
    try:
        with suppress(Interrupted), run.interruption.deferred():
            objects = list(run.store.objects(run.prefix))
            left = complete(objects, run.prefix, lambda item: run.store.get(item.key, most=Receipt.limits.size))
            for key in all_of_run(objects, run.prefix):
                run.store.delete(key)
                left = [one for one in left if not key.startswith(run.prefix + one.prefix)]
    except Exception as error:
        log.warning("the run's checkpoints could not be deleted. They will be deleted with the FineTuneJob: %s", error)
    if left is not None:
        run.progress.update(checkpoints=[checkpoint.ref() for checkpoint in left])


def trained_to_the_end(run: Run) -> bool:
    """Return whether an earlier attempt has stored its weights after the last step."""
    found = complete(
        run.store.objects(run.prefix), run.prefix, lambda item: run.store.get(item.key, most=Receipt.limits.size)
    )
    return any(checkpoint.final for checkpoint in found)


def quieten() -> None:
    """Turn off progress bars of the libraries, and their advice that is meant for programmers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
