"""import: make a version of an adapter or model that was tuned elsewhere, if it can be served and fits the base model.

The files are not trusted: weights must be safetensors, the config is reduced to known keys, and no code in them is run.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.artifacts.layout import split_s3_uri
from graft.artifacts.listing import listing
from graft.artifacts.manifest import ALLOWED_FILES, PEOPLE_FILES, ManifestBaseModel
from graft.artifacts.manifest import SHARD as SHARD_NAME
from graft.artifacts.sources import (
    SourceError,
    check_config_size,
    download_config,
    hub_errors,
    s3_digest,
    s3_files,
    split_hf_uri,
)
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo
from graft.contracts.progress import Reason
from safetensors import SafetensorError, safe_open

from graft_trainer.model.adapterconfig import invalid, reduced_config
from graft_trainer.model.basemodel import PICKLES, check_base_model, load_config, stored_quantization
from graft_trainer.model.shapes import base_of_shapes, check_adapter, check_numbers
from graft_trainer.model.wrappers import served_class, tuned_class
from graft_trainer.run.failures import Failure, out_of_memory
from graft_trainer.versions.card import base_fields
from graft_trainer.versions.making import Made, Making, write_base_config
from graft_trainer.versions.measuring import measured_effect

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHERE = "Correct spec.import.uri, or let this namespace's key or Hugging Face token read it."


def import_version(making: Making, source: str) -> Made:
    """Copy the files at `source` to settings.adapter_dir and check them.

    Raises Failure(AdapterInvalid) if a check fails.
    """
    with _source_errors(source):
        return _whole_model(making, source) if making.file.method == "full" else _adapter(making, source)


def _adapter(making: Making, source: str) -> Made:
    file, folder = making.file, making.settings.adapter_dir
    pinned, digest = fetch_adapter(making, source, folder)
    config = reduced_config((folder / CONFIG).read_bytes(), source, file.method, file.task)
    base_config = write_base_config(making)
    base = base_of_shapes(base_config, file.base_model.name, file.task)
    fit = check_adapter(folder, config, base, source, file.base_model.name)
    # The author's value may be a name that is valid only on the author's machine.
    config = fit.config
    config |= base_fields(file.base_model)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    known = {"rank": fit.rank, "alpha": fit.alpha, "virtualTokens": fit.virtual_tokens}
    return Made(
        _base_model(making),
        rank=fit.rank,
        targets=fit.targets,
        hyperparameters={key: value for key, value in known.items() if value is not None},
        imported_from=pinned,
        source_digest=digest,
        effect=measured_effect(making, _base_model(making), base_config, folder),
        auto_class=served_class(load_config(base_config, file.base_model.name), file.task).__name__,
    )


def fetch_adapter(making: Making, source: str, folder: Path) -> tuple[str, str | None]:
    """Copy the adapter's config and weights to `folder`.

    Return (the pinned URI, the digest of the s3:// listing or None).
    """
    if source.startswith("hf://"):
        return _adapter_of_hub(making, source, folder), None
    bucket, prefix = split_s3_uri(source)
    found = {item.key.removeprefix(prefix): item for item in listing(making.store, prefix, bucket)}
    _check_names(source, set(found))
    check_config_size(found[CONFIG].size, CONFIG, source)
    chosen: list[ObjectInfo] = [found[CONFIG], found[WEIGHTS]]
    for item in chosen:
        making.store.download(item, folder / item.key.removeprefix(prefix), bucket)
    return source, s3_digest(prefix, chosen)


def _adapter_of_hub(making: Making, source: str, folder: Path) -> str:
    from graft.artifacts.hub import HfApi, hf_hub_download

    repo, revision = split_hf_uri(source)
    endpoint, token = making.file.hf_endpoint, making.settings.hf_token() or False
    with hub_errors(source):
        info = HfApi(endpoint=endpoint, token=token).model_info(
            repo, revision=revision, files_metadata=True, timeout=20
        )
    sizes = {item.rfilename: item.size for item in info.siblings or []}
    _check_names(source, set(sizes))
    local = making.settings.work_dir / "hub"
    with hub_errors(source):
        config = download_config(repo, CONFIG, info.sha, sizes[CONFIG], endpoint=endpoint, token=token, local_dir=local)
        shutil.move(config, folder / CONFIG)
        path = hf_hub_download(repo, WEIGHTS, revision=info.sha, endpoint=endpoint, token=token, local_dir=local)
    shutil.move(path, folder / WEIGHTS)
    return f"hf://{repo}@{info.sha}"


def _check_names(source: str, names: set[str]) -> None:
    if CONFIG not in names:
        hint = " It looks like a whole model: set spec.method to full." if "config.json" in names else ""
        raise invalid(f"there is no {CONFIG} at {source}.{hint}", WHERE)
    if WEIGHTS not in names:
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        found = f", only {', '.join(pickles[:3])}" if pickles else ""
        raise invalid(
            f"there is no {WEIGHTS} at {source}{found}",
            "Convert the weights to safetensors (peft's save_pretrained does this). Graft never loads pickled weights.",
        )


def _whole_model(making: Making, source: str) -> Made:
    """Import a whole model with the base model's architecture and shapes."""
    file, settings = making.file, making.settings
    pinned, digest = _pin(making, source)
    folder = making.fetch(pinned, digest, settings.work_dir / "imported", source)
    try:
        config = check_base_model(folder, source, file.task)
    except Failure as error:
        raise invalid(error.message) from error
    base_config = load_config(write_base_config(making), file.base_model.name)
    if stored_quantization(config) is not None:
        raise invalid(f"{source} is quantised", "Import the model in 16 or 32 bits.")
    _check_whole(folder, base_config, config, making, source)
    for path in sorted(folder.iterdir()):
        if path.name in ALLOWED_FILES - PEOPLE_FILES - {CONFIG, WEIGHTS} or SHARD_NAME.fullmatch(path.name):
            shutil.move(path, settings.adapter_dir / path.name)
    auto_class = tuned_class(base_config, file.task).__name__
    return Made(_base_model(making), imported_from=pinned, source_digest=digest, auto_class=auto_class)


def _pin(making: Making, source: str) -> tuple[str, str | None]:
    if source.startswith("hf://"):
        from graft.artifacts.hub import HfApi

        repo, revision = split_hf_uri(source)
        api = HfApi(endpoint=making.file.hf_endpoint, token=making.settings.hf_token() or False)
        with hub_errors(source):
            return f"hf://{repo}@{api.model_info(repo, revision=revision, timeout=20).sha}", None
    _, prefix, files = s3_files(making.store, source)
    return source, s3_digest(prefix, files)


def _check_whole(folder: Path, base_config: Any, config: dict[str, Any], making: Making, source: str) -> None:
    """Raise Failure(AdapterInvalid) unless the weights are complete, fit the base model's architecture and are
    finite."""
    name, remedy = making.file.base_model.name, "Set spec.baseModel to the BaseModel from which it was tuned."
    # A version of a multimodal model that was tuned here is its language model alone.
    if config.get("model_type") not in {base_config.model_type, base_config.get_text_config().model_type}:
        raise invalid(
            f"{source} is a {config.get('model_type')} model, but {name} is a {base_config.model_type} model", remedy
        )
    other = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if path.name != "model.safetensors" and not SHARD_NAME.fullmatch(path.name)
    )
    if other:
        raise invalid(
            f"{source}: {other[0]} is not a name that transformers uses, such as model.safetensors or model-00001-of-00002.safetensors",
            "Save the model again with save_pretrained.",
        )
    try:
        # On the meta device, only names and shapes are compared. No weight is read.
        _, found = tuned_class(base_config, making.file.task).from_pretrained(
            folder,
            config=base_config,
            local_files_only=True,
            use_safetensors=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if keys := sorted(str(key) for key in found.get(problem) or ()):
                kind = problem.partition("_")[0]
                raise invalid(f"{source}: {len(keys)} weights are {kind} for {name}, the first is {keys[0]}", remedy)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118
                    check_numbers(file, tensor, source)
    except SafetensorError as error:
        raise invalid(f"{source}: a file is not a complete safetensors file: {error}") from error
    except (ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise invalid(f"{source} cannot be loaded: {error}") from error


def _base_model(making: Making) -> ManifestBaseModel:
    ref = making.file.base_model
    return ManifestBaseModel(name=ref.name, uri=ref.uri, digest=ref.digest)


@contextmanager
def _source_errors(source: str) -> Iterator[None]:
    """Turn errors of the source or the store into Failures about the import."""
    try:
        yield
    except SourceError as error:
        if error.transient:
            raise Failure(
                Reason.STORAGE_UNAVAILABLE,
                f"the source did not answer: {error}",
                "Check that the source is reachable from this namespace. The Job retries.",
            ) from error
        raise invalid(f"{source} cannot be read: {error}", WHERE) from error
    except StoreError as error:
        if error.trouble in {"missing", "bucket", "denied"}:
            raise invalid(f"{source} cannot be read with this namespace's key: {error}", WHERE) from error
        raise
