"""prepare: everything that can be found wrong without a GPU, in the order in which it is cheap to find.

Runs as an init container without a GPU and imports no torch, so a job with a mistake fails within seconds and before a
GPU is taken. What it downloads lies in the work folder that it shares with train.
"""

import logging
import time

from graft.artifacts.sources import Report, fetch

from graft_trainer.basemodel import check_base_model, check_chat_template
from graft_trainer.dataset import check_template
from graft_trainer.download import download_dataset
from graft_trainer.run import Prepared, Run, already_published, load_examples

log = logging.getLogger(__name__)


def prepare(run: Run) -> None:
    """Check dataset and base model, and put both into the work folder."""
    job, settings = run.job, run.settings
    run.progress.stage("Preparing")
    if already_published(run):
        log.info("%s %s was published by an earlier attempt: nothing to do", job.output.adapter, job.output.version)
        return

    for template in job.dataset.templates or []:
        check_template(template)
    digests = {}
    for role, source in (("train", job.dataset.train), ("eval", job.dataset.eval)):
        if source is None:
            continue
        path = settings.dataset_dir / f"{role}.jsonl"
        digests[role] = download_dataset(
            source.uri, path, role=role, store=run.store, settings=settings, hf_endpoint=job.hf_endpoint
        )
        log.info("dataset.%s: %s, %d bytes, %s", role, source.uri, path.stat().st_size, digests[role])
    train, held_out = load_examples(run)
    log.info("dataset: %d examples to learn from, %d held out", len(train), len(held_out))

    base_model_dir = fetch(
        job.base_model.uri,
        job.base_model.digest,
        settings.base_model_dir,
        store=run.store,
        pvc_root=settings.pvc_dir,
        hf_endpoint=job.hf_endpoint,
        hf_token=settings.hf_token(),
        report=_log_download(job.base_model.name),
    )
    config = check_base_model(base_model_dir, job.base_model.name)
    check_chat_template(base_model_dir, job.base_model.name, job.dataset)
    log.info("base model %s: %s", job.base_model.name, ", ".join(config.get("architectures") or [config["model_type"]]))
    Prepared(str(base_model_dir), digests).write(settings.prepared_file)


def _log_download(name: str) -> Report:
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= 5:
            last = time.monotonic()
            log.info("base model %s: %.1f of %.1f MB", name, done / 1e6, total / 1e6)

    return report
