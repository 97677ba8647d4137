"""train's container: train, evaluate, publish, or nothing when an earlier attempt has published the version already."""

import logging
import warnings

from graft.artifacts.layout import run_prefix

from graft_trainer import distributed
from graft_trainer.checkpoint import complete
from graft_trainer.download import patiently
from graft_trainer.run import Prepared, Run, already_published, memory_halvings

log = logging.getLogger(__name__)


def train_evaluate_publish(run: Run) -> None:
    """The life of an attempt after prepare."""
    if published := already_published(run):
        manifest, digest = published
        log.info("%s %s was published by an earlier attempt: done", manifest.adapter, manifest.version)
        run.progress.stage(
            "Succeeded",
            percent=100,
            metrics=manifest.metrics,
            rejected=manifest.rejected or None,
            training=manifest.hyperparameters,
            target_modules=manifest.target_modules,
            manifest_digest=digest,
        )
        return
    if distributed.world_size() > 1:
        if not trained_to_the_end(run):
            distributed.join()
        elif not distributed.is_main():
            return  # the first process goes on alone
    run.progress.stage("Training", dataset=Prepared.read(run.settings.prepared_file).statistics)
    run.halvings = distributed.from_main(patiently(lambda: memory_halvings(run), run.settings.storage_patience))
    quieten()
    # Imported here because torch takes seconds to load, and a published version needs none of it.
    from graft_trainer.evaluate import evaluate
    from graft_trainer.train import train

    try:
        trained = train(run)
    except distributed.PartDone:
        return
    evaluated = evaluate(run, trained)
    from graft_trainer.publish import publish  # with matplotlib, whose first import takes seconds that a GPU would wait

    publish(run, trained, evaluated)


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
