"""What compose and import share: one attempt to make a version, its result, and the base model's config."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.artifacts.layout import adapter_prefix
from graft.artifacts.manifest import Effect, ManifestBaseModel, ManifestParent
from graft.artifacts.sources import SourceError, describe, fetch, pvc_path
from graft.artifacts.store import S3Store
from graft.contracts.job import VersionFile
from graft.contracts.progress import Reason

from graft_trainer.run.download import tell
from graft_trainer.run.failures import Failure
from graft_trainer.run.settings import Settings


@dataclass(frozen=True)
class Making:
    """One attempt to make one version."""

    file: VersionFile
    settings: Settings
    store: S3Store

    @property
    def prefix(self) -> str:
        """The folder in the store where the version is published."""
        output = self.file.output
        return adapter_prefix(self.file.tenant, output.adapter, output.version)

    def fetch(self, uri: str, digest: str | None, folder: Path, what: str, *, weights: bool = True) -> Path:
        """Return the folder with a model's files. They are downloaded to `folder`, unless a volume has them.

        The log tells the progress of `what`. Raises SourceError, and OSError if the disk is full.
        """
        return fetch(
            uri,
            digest,
            folder,
            store=self.store,
            pvc_root=self.settings.pvc_dir,
            hf_endpoint=self.file.hf_endpoint,
            hf_token=self.settings.hf_token(),
            report=tell(what),
            weights=weights,
        )


@dataclass(frozen=True)
class Made:
    """The facts for the manifest about the files in settings.adapter_dir."""

    base_model: ManifestBaseModel
    rank: int | None = None
    targets: list[str] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    parents: list[ManifestParent] = field(default_factory=list)
    composition: dict[str, Any] | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    prompt_template: str | None = None
    imported_from: str | None = None
    source_digest: str | None = None
    effect: Effect | None = None
    auto_class: str | None = None  # the class of transformers that holds the base model


def write_base_config(making: Making) -> Path:
    """Write the base model's config.json to a folder and return the folder.

    Compose and import need no other file of it, unless they merge or measure.
    """
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
            f"cannot read config.json of the base model {file.base_model.name}: {error}",
            "Correct spec.source of the BaseModel, or let this namespace's key or Hugging Face token read it.",
        ) from error
    (folder / "config.json").write_text(json.dumps(found.config))
    return folder
