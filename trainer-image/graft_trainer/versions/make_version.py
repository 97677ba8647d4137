"""compose and import: read the version file, make a version without training, and publish it.

The manifest comes last.
"""

import errno
import hashlib
import json
import logging
import shutil

from graft.artifacts import publishing, versions
from graft.artifacts.manifest import Manifest, ManifestJob
from graft.artifacts.storage import StoreError
from graft.contracts.job import VersionFile
from graft.contracts.progress import Reason
from graft.report.card import render_card

from graft_trainer.run.earlier import find_manifest
from graft_trainer.run.failures import Failure, store_failure
from graft_trainer.run.progress import now
from graft_trainer.run.run import open_store, read_message
from graft_trainer.run.settings import Settings
from graft_trainer.versions.card import add_card
from graft_trainer.versions.making import Made, Making

log = logging.getLogger(__name__)


def make_version(settings: Settings) -> str:
    """Make and publish the version of the version file. Return its manifest's digest. Raises Failure."""
    file = read_message(settings.job_file, VersionFile)
    return run(Making(file, settings, open_store(settings)))


def run(making: Making) -> str:
    """Make and publish the version, unless an earlier attempt has published it. Return its manifest's digest."""
    if (before := published_before(making)) is not None:
        log.info("an earlier attempt has published %s", before)
        return before
    shutil.rmtree(making.settings.adapter_dir, ignore_errors=True)
    making.settings.adapter_dir.mkdir(parents=True)
    try:
        if making.file.composition is not None:
            # Imported here because each imports torch and peft. A version that is already published needs neither.
            from graft_trainer.versions.compose import compose

            made = compose(making, making.file.composition)
        else:
            from graft_trainer.versions.importing import import_version

            made = import_version(making, making.file.source or "")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the pod's work folder is full: {error}",
            "Set ephemeral-storage in spec.compose.resources or spec.import.resources above twice the size of the files that are read.",
        ) from error
    return publish(making, made)


def published_before(making: Making) -> str | None:
    """Return the manifest's digest if an earlier attempt has published the version.

    Raises Failure(VersionExists) if another resource has.
    """
    if (found := find_manifest(making.store, making.prefix, making.file.job.uid)) is None:
        return None
    manifest, digest = found
    if manifest is not None and manifest.job.uid == making.file.job.uid:
        return digest
    raise taken(making)


def taken(making: Making) -> Failure:
    output = making.file.output
    return Failure(
        Reason.VERSION_EXISTS,
        f"{output.adapter} {output.version} is already published by another resource",
        "Create an Adapter with another version. Published versions never change.",
    )


def publish(making: Making, made: Made) -> str:
    """Publish the files in settings.adapter_dir. Return the manifest's digest."""
    # Imported here because it imports torch.
    from graft_trainer.versions.tokenizer import add_tokenizer_of_base

    job, folder = making.file, making.settings.adapter_dir
    if job.method != "full":
        add_tokenizer_of_base(making, made)
    files = {path.name: path for path in sorted(folder.iterdir())}
    parents = [item.model_dump() for item in made.parents]
    origin = [made.composition, parents, made.imported_from, made.source_digest]
    manifest = Manifest(
        adapter=job.output.adapter,
        version=job.output.version,
        method=job.method,
        base_model=made.base_model,
        job=ManifestJob(
            name=job.job.name, namespace=job.job.namespace, uid=job.job.uid, attempt=making.settings.attempt
        ),
        recipe="sha256:" + hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest(),
        hyperparameters=made.hyperparameters,
        task=job.task,
        rank=made.rank,
        target_modules=made.targets,
        stop_token_ids=made.stop_token_ids,
        prompt_template=made.prompt_template,
        files=versions.describe_files(files),
        image=job.trainer_image,
        parents=made.parents,
        composition=made.composition,
        imported_from=made.imported_from,
        source_digest=made.source_digest,
        effect=made.effect,
        created_at=now(),
    )
    card = render_card(manifest, license_=job.base_model.license, auto_class=made.auto_class)
    manifest = add_card(manifest, card, files, folder)
    try:
        _, done = publishing.stage(making.store, making.prefix, files, manifest)
    except StoreError as error:
        if error.trouble == "exists":
            raise taken(making) from error
        found = store_failure(error, publishing=True)
        raise Failure(found.reason, found.message, found.remedy) from error
    log.info("staged %s %s: %s, %.1f MB", job.output.adapter, job.output.version, done, manifest.size_bytes / 1e6)
    return done
