"""What the Hub's libraries read of a version: the model card, and the fields of adapter_config.json that name the base
model."""

from pathlib import Path

from graft.artifacts import versions
from graft.artifacts.adapterconfig import base_reference
from graft.artifacts.manifest import CARD, Manifest, ManifestBaseModel
from graft.contracts.message import BaseModelRef


def base_fields(base_model: BaseModelRef | ManifestBaseModel) -> dict[str, str]:
    """Return the fields of adapter_config.json that name the base model, as peft reads them."""
    name, revision = base_reference(base_model.name, base_model.uri)
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})


def add_card(manifest: Manifest, card: str, files: dict[str, Path], folder: Path) -> Manifest:
    """Write the model card of a version beside its files, and add it to `files`. Return the manifest that lists it."""
    files[CARD] = folder / CARD
    files[CARD].write_text(card, encoding="utf-8")
    entries = [*manifest.files, *versions.describe_files({CARD: files[CARD]})]
    return manifest.model_copy(update={"files": sorted(entries, key=lambda entry: entry.name)})
