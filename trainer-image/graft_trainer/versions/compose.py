"""compose: combine several LoRA updates into one adapter, or merge them into the base model.

peft's add_weighted_adapter does the mathematics. To combine adapters, the base model's weights are not needed, see
shapes.py. Only a merge needs them, and the measurement of the result's effect.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from graft.api.composition import CompositionMethod
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestParent
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.contracts.job import Composition, ParentVersion
from graft.contracts.progress import Reason
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from graft_trainer.model.adapterconfig import invalid, reduced_config
from graft_trainer.model.basemodel import check_base_model, load_config, load_tokenizer, stored_quantization
from graft_trainer.model.model import stored_dtype
from graft_trainer.model.shapes import base_of_shapes, check_adapter, check_numbers
from graft_trainer.model.wrappers import served_class
from graft_trainer.run.download import fetch_version
from graft_trainer.run.failures import Failure, out_of_memory
from graft_trainer.versions.making import Made, Making, write_base_config
from graft_trainer.versions.measuring import measured_effect
from graft_trainer.versions.publish import SHARD, reduce_config
from graft_trainer.versions.tokenizer import copy_tokenizer, write_chat_template

log = logging.getLogger(__name__)
PEFT_NAMES: dict[CompositionMethod, str] = {
    "linear": "linear",
    "cat": "cat",
    "svd": "svd",
    "ties": "ties",
    "tiesSvd": "ties_svd",
    "dareLinear": "dare_linear",
    "dareLinearSvd": "dare_linear_svd",
    "dareTies": "dare_ties",
    "dareTiesSvd": "dare_ties_svd",
}
RESULT = "composed"  # name of the result in the model, beside parent-0, parent-1, …


def compose(making: Making, wanted: Composition) -> Made:
    """Combine the parents, and write the result to settings.adapter_dir."""
    file, settings = making.file, making.settings
    work = settings.work_dir / "parents"
    shutil.rmtree(work, ignore_errors=True)
    folders = [work / f"parent-{number}" for number in range(len(wanted.parents))]
    manifests = [fetch_parent(making, one, folder) for one, folder in zip(wanted.parents, folders, strict=True)]
    base_model = manifests[0].base_model
    base_config = write_base_config(making)
    name = file.base_model.name

    combined = settings.adapter_dir if wanted.into == "adapter" else settings.work_dir / "combined"
    combine(base_of_shapes(base_config, name, file.task), folders, wanted, combined)
    reduce_config(combined / "adapter_config.json", base_model)
    # The result gets the same checks as an imported adapter: its tensors fit the base model and are finite.
    config = reduced_config((combined / "adapter_config.json").read_bytes(), "the result", "lora", file.task)
    fit = check_adapter(combined, config, base_of_shapes(base_config, name, file.task), "the result", name)

    made = Made(
        base_model,
        rank=fit.rank,
        targets=fit.targets,
        hyperparameters={"rank": fit.rank, "alpha": fit.alpha},
        parents=[
            ManifestParent(adapter=one.adapter, version=one.version, digest=parent.digest, weight=parent.weight)
            for one, parent in zip(manifests, wanted.parents, strict=True)
        ],
        composition=wanted.model_dump(by_alias=True, exclude={"parents"}, exclude_none=True),
        stop_token_ids=sorted({token for one in manifests for token in one.stop_token_ids}),
        effect=measured_effect(making, base_model, base_config, combined) if wanted.into == "adapter" else None,
        prompt_template=manifests[0].prompt_template if len({one.prompt_template for one in manifests}) == 1 else None,
        auto_class=served_class(load_config(base_config, name), file.task).__name__,
    )
    if wanted.into == "adapter":
        return made
    merge(making, base_model, combined, settings.adapter_dir, made.stop_token_ids)
    if made.prompt_template is not None:
        write_chat_template(settings.adapter_dir, made.prompt_template, load_tokenizer(settings.adapter_dir, name))
    return Made(
        base_model,
        parents=made.parents,
        composition=made.composition,
        stop_token_ids=made.stop_token_ids,
        prompt_template=made.prompt_template,
        auto_class=made.auto_class,
    )


def fetch_parent(making: Making, parent: ParentVersion, folder: Path) -> Manifest:
    """Download the parent's files, verify them, and reduce its config. Return the parent's manifest.

    Raises Failure(AdapterInvalid) if the parent cannot be used.
    """
    try:
        manifest = fetch_version(making.store, parent.uri, parent.digest, folder)
    except InvalidArtifact as error:
        raise invalid(
            f"{parent.name} is damaged: {error}", "Choose another version in spec.compose.parents."
        ) from error
    except StoreError as error:
        if error.trouble == "unavailable":
            raise
        raise invalid(
            f"{parent.name} cannot be read: {error}", "Choose a version whose files exist in spec.compose.parents."
        ) from error
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(reduced_config(path.read_bytes(), parent.name, "lora", making.file.task)))
    return manifest


def combine(base: Any, folders: list[Path], wanted: Composition, target: Path) -> None:
    """Write the weighted combination of the adapters in `folders` to `target`. `base` is a base_of_shapes."""
    parents = [f"parent-{number}" for number in range(len(folders))]
    names = ", ".join(parent.name for parent in wanted.parents)
    try:
        with warnings.catch_warnings():
            # Warnings about several adapters in one model, and about shared embeddings.
            warnings.simplefilter("ignore", UserWarning)
            model = PeftModel.from_pretrained(base, folders[0], adapter_name=parents[0], torch_device="cpu")
            for parent, folder in zip(parents[1:], folders[1:], strict=True):
                model.load_adapter(folder, parent, torch_device="cpu")
            for parent in parents:
                plain_targets(model, parent)
            torch.manual_seed(wanted.seed)  # chooses the values that dare drops
            model.add_weighted_adapter(
                parents,
                [parent.weight for parent in wanted.parents],
                RESULT,
                combination_type=PEFT_NAMES[wanted.method],
                svd_rank=wanted.svd_rank,
                svd_full_matrices=False,  # the unused rest of them would be larger than the update itself
                density=wanted.density,
                majority_sign_method=wanted.majority_sign,
            )
            written = target.parent / "written"
            model.save_pretrained(written, selected_adapters=[RESULT], save_embedding_layers=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise invalid(
            f"{names} cannot be combined by {wanted.method}: {error}",
            "Set spec.compose.method to cat or svd, which accept parents of different ranks.",
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    (written / RESULT).rename(target)
    shutil.rmtree(written)
    (target / "README.md").unlink(missing_ok=True)  # peft's empty model card
    log.info("combined %s by %s", names, wanted.method)


def plain_targets(model: Any, name: str) -> None:
    """Change an adapter's config to a form that peft can combine: its modules listed by name, and no rank-stabilised
    scale.

    peft makes the result's config from the first parent's config. A rank-stabilised scale would be applied to the
    result once more, and layers that the first parent leaves out would be lost. The layers already contain each
    adapter's own scale.
    """
    config = model.peft_config[name]
    config.use_rslora = False
    if isinstance(config.target_modules, str) or config.layers_to_transform is not None or config.exclude_modules:
        inner = model.get_base_model()
        config.target_modules = {
            key
            for key, module in inner.named_modules()
            if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
        }
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def merge(making: Making, trained_on: ManifestBaseModel, adapter: Path, target: Path, stop: list[int]) -> None:
    """Merge the adapter into the base model's weights. The tokens `stop` end the answers of the result.

    Write the model to `target`, in the type of the base model's files.
    """
    file, settings = making.file, making.settings
    ref = file.base_model
    if (trained_on.digest or trained_on.uri) != (ref.digest or ref.uri):
        raise invalid(
            f"the parents belong to {trained_on.uri} ({trained_on.digest}), but {ref.name} is now {ref.uri} ({ref.digest})",
            "Set spec.baseModel to a BaseModel of the parents' revision.",
        )
    folder = making.fetch(ref.uri, ref.digest, settings.base_model_dir, "base model")
    if stored_quantization(check_base_model(folder, ref.name, file.task)) is not None:
        raise invalid(
            f"{ref.name} is quantised, so that no update can be merged into its weights",
            "Compose with into: adapter, or set spec.baseModel to a BaseModel with the weights in 16 bits.",
        )
    config = load_config(folder, ref.name)
    try:
        base: Any = served_class(config, file.task).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=stored_dtype(config)
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Failure(
            Reason.BASE_MODEL_INVALID,
            f"the weights of {ref.name} cannot be loaded: {type(error).__name__}: {error}",
            "Set spec.source of the BaseModel to a complete folder of a language model that transformers supports.",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about shared embeddings, which are refused below
        model = PeftModel.from_pretrained(base, adapter, torch_device="cpu")
    refuse_shared_embeddings(model, ref.name)
    merged: Any = model.merge_and_unload()
    if stop and merged.generation_config is not None:
        merged.generation_config.eos_token_id = stop
    merged.save_pretrained(target, max_shard_size=SHARD)
    copy_tokenizer(folder, target)
    check_weights(target)


def refuse_shared_embeddings(model: Any, name: str) -> None:
    """Raise Failure if the adapter updates token embeddings that the head shares: a merge would change the head,
    too."""
    head = model.get_output_embeddings()
    for key, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Embedding):
            table = module.get_base_layer().weight
            if head is not None and head.weight is table:
                raise invalid(
                    f"a parent has an update of the token embeddings ({key.removeprefix('base_model.model.')}). {name} shares "
                    "these embeddings with its head, so a merge would change both",
                    "Compose with into: adapter, or train the parent without the embeddings in its targetModules.",
                )


def check_weights(folder: Path) -> None:
    """Raise Failure(AdapterInvalid) if a weight is NaN or infinite."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                check_numbers(file, name, "the merged model")
