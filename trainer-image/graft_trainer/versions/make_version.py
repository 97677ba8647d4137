"""compose and import: a version without training. Read what is wanted, make its files, publish them; the manifest last."""

import errno
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.artifacts import versions
from graft.artifacts.layout import MANIFEST, adapter_prefix
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob, ManifestParent, digest
from graft.artifacts.sources import SourceError, describe, pvc_path
from graft.artifacts.store import S3Store, StorageConfig, StoreError, patiently
from graft.contracts.job import VersionFile
from graft.contracts.progress import Reason
from pydantic import ValidationError

from graft_trainer.run.failures import Failure, store_failure
from graft_trainer.run.progress import now
from graft_trainer.run.run import read_message
from graft_trainer.run.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """One attempt at one version."""

    file: VersionFile
    settings: Settings
    store: S3Store

    @property
    def prefix(self) -> str:
        output = self.file.output
        return adapter_prefix(self.file.tenant, output.adapter, output.version)


@dataclass(frozen=True)
class Made:
    """The files in settings.adapter_dir, and what the manifest says about them."""

    base_model: ManifestBaseModel
    rank: int | None = None
    targets: list[str] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    parents: list[ManifestParent] = field(default_factory=list)
    composition: dict[str, Any] | None = None
    imported_from: str | None = None
    source_digest: str | None = None


def make_version(settings: Settings) -> str:
    """The digest of the version's manifest. Failure says what to do."""
    file = read_message(settings.job_file, VersionFile)
    try:
        store = S3Store(StorageConfig.from_dir(settings.storage_dir))
    except ValueError as error:  # botocore's word for an endpoint that is no URL
        raise Failure(
            Reason.STORAGE_DENIED,
            f"the object store cannot be opened: {error}",
            "Correct the endpoint in the Secret graft-storage; it is a URL such as https://s3.example.com.",
        ) from error
    return run(Making(file, settings, store))


def run(making: Making) -> str:
    """Make the version, unless an earlier attempt has; the digest of its manifest."""
    if (before := published_before(making)) is not None:
        log.info("an earlier attempt has published %s", before)
        return before
    shutil.rmtree(making.settings.adapter_dir, ignore_errors=True)
    making.settings.adapter_dir.mkdir(parents=True)
    try:
        if making.file.composition is not None:
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
            "Set ephemeral-storage in spec.compose.resources or spec.import.resources above twice the size of what is read.",
        ) from error
    return publish(making, made)


def published_before(making: Making) -> str | None:
    """The manifest's digest when an earlier attempt has published the version; Failure(VersionExists) when another has."""
    try:
        data = patiently(lambda: making.store.get(making.prefix + MANIFEST), making.settings.storage_patience)
    except StoreError as error:
        if error.trouble == "missing":
            return None
        raise
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        manifest = None
    if manifest is not None and manifest.job.uid == making.file.job.uid:
        return digest(data)
    raise taken(making)


def taken(making: Making) -> Failure:
    output = making.file.output
    return Failure(
        Reason.VERSION_EXISTS,
        f"{output.adapter} {output.version} is published already, by another resource",
        "Create an Adapter of another version; published versions never change.",
    )


def write_base_config(making: Making) -> Path:
    """A folder with the base model's config.json: all of it that is needed where its weights are not."""
    file, settings = making.file, making.settings
    folder = settings.work_dir / "base-config"
    folder.mkdir(parents=True, exist_ok=True)
    uri = file.base_model.uri
    if uri.startswith("pvc://"):
        shutil.copyfile(pvc_path(uri, settings.pvc_dir) / "config.json", folder / "config.json")
        return folder
    try:
        found = describe(uri, making.store, file.hf_endpoint, settings.hf_token())
    except SourceError as error:
        if error.transient:
            raise
        raise Failure(
            Reason.BASE_MODEL_UNAVAILABLE,
            f"the config.json of the base model {file.base_model.name} cannot be had: {error}",
            "Correct spec.source of the BaseModel, or let this namespace's key or Hugging Face token read it.",
        ) from error
    (folder / "config.json").write_text(json.dumps(found.config))
    return folder


def publish(making: Making, made: Made) -> str:
    """Publish the files that were made; the manifest's digest."""
    job = making.file
    files = {path.name: path for path in sorted(making.settings.adapter_dir.iterdir())}
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
        files=versions.describe_files(files),
        image=job.trainer_image,
        parents=made.parents,
        composition=made.composition,
        imported_from=made.imported_from,
        source_digest=made.source_digest,
        created_at=now(),
    )
    try:
        done = patiently(
            lambda: versions.publish(making.store, making.prefix, files, manifest), making.settings.storage_patience
        )
    except StoreError as error:
        if error.trouble == "exists":
            raise taken(making) from error
        found = store_failure(error, publishing=True)
        raise Failure(found.reason, found.message, found.remedy) from error
    log.info("published %s %s: %s, %.1f MB", job.output.adapter, job.output.version, done, manifest.size_bytes / 1e6)
    return done
