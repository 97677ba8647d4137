"""train's container: train, evaluate, publish, or nothing when an earlier attempt has published the version already."""

import logging
import warnings

from graft_trainer.run import Run, already_published

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
            training=manifest.hyperparameters,
            target_modules=manifest.target_modules,
            manifest_digest=digest,
        )
        return
    run.progress.stage("Training")
    quieten()
    # Imported here because torch takes seconds to load, and a published version needs none of it.
    from graft_trainer.evaluate import evaluate
    from graft_trainer.publish import publish
    from graft_trainer.train import train

    trained = train(run)
    evaluated = evaluate(run, trained)
    publish(run, trained, evaluated)


def quieten() -> None:
    """Leave the log to the run: no progress bars and no advice that is meant for the libraries' callers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
