"""publish: the adapter's files, their manifest and a report, to object storage; the manifest last."""

import json
import logging
import shutil
import time
from pathlib import Path

from graft.artifacts import versions
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.store import StoreError

from graft_trainer.download import patiently
from graft_trainer.evaluate import Evaluated
from graft_trainer.failures import Failure, store_failure
from graft_trainer.progress import now
from graft_trainer.report import finite, report
from graft_trainer.run import Run
from graft_trainer.train import Trained

log = logging.getLogger(__name__)
FILES = ("adapter_config.json", "adapter_model.safetensors", "report.json")


def publish(run: Run, trained: Trained, evaluated: Evaluated) -> str:
    """Publish the version; the manifest's digest."""
    started = time.monotonic()
    run.progress.stage("Publishing")
    folder = run.settings.adapter_dir
    shutil.rmtree(folder, ignore_errors=True)
    trained.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    reduce_config(folder / "adapter_config.json", run.job.base_model.uri)
    (folder / "report.json").write_text(json.dumps(report(run, trained, evaluated), indent=1) + "\n")

    files = {name: folder / name for name in FILES}
    manifest = describe(run, trained, evaluated, files)
    try:
        # The second round finds the manifest of the first when only its answer was lost; publishing it again is a no-op.
        digest = patiently(lambda: _publish_twice(run, files, manifest), run.settings.storage_patience)
    except StoreError as error:
        found = store_failure(error, publishing=True)
        raise Failure(found.reason, found.message, found.remedy) from error
    log.info(
        "published %s %s: %s, %.1f MB in %.1f s",
        run.job.output.adapter,
        run.job.output.version,
        digest,
        manifest.size_bytes / 1e6,
        time.monotonic() - started,
    )
    run.progress.stage("Succeeded", manifest_digest=digest, metrics=evaluated.metrics)
    return digest


def _publish_twice(run: Run, files: dict[str, Path], manifest: Manifest) -> str:
    try:
        return versions.publish(run.store, run.version_prefix, files, manifest)
    except StoreError as error:
        if error.trouble != "exists":
            raise
        return versions.publish(run.store, run.version_prefix, files, manifest)


def reduce_config(path: Path, base_model_uri: str) -> None:
    """Leave in adapter_config.json what says something: no empty fields, no path of this pod, lists in a fixed order."""
    config = {key: value for key, value in json.loads(path.read_text()).items() if value not in (None, {}, [])}
    config["base_model_name_or_path"] = base_model_uri
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def describe(run: Run, trained: Trained, evaluated: Evaluated, files: dict[str, Path]) -> Manifest:
    """The manifest: what the version is, from what it was made, and the digest of every file."""
    job = run.job
    return Manifest(
        adapter=job.output.adapter,
        version=job.output.version,
        method=job.method.name,
        base_model=ManifestBaseModel(name=job.base_model.name, uri=job.base_model.uri, digest=job.base_model.digest),
        job=ManifestJob(name=job.job.name, namespace=job.job.namespace, uid=job.job.uid, attempt=run.settings.attempt),
        recipe=job.recipe,
        hyperparameters=trained.resolved.wire(),
        datasets=trained.digests,
        metrics=finite(evaluated.metrics),
        rank=trained.resolved.rank,
        target_modules=trained.targets,
        files=versions.describe_files(files),
        image=job.trainer_image,
        created_at=now(),
    )
