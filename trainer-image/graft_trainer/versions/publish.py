"""publish: upload the trained weights, the reports and the manifest to object storage. The manifest comes last."""

import json
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from graft.artifacts import publishing, versions
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestFile, ManifestJob
from graft.artifacts.storage import StoreError
from graft.contracts.job import JobFile
from graft.contracts.message import BaseModelRef
from graft.report.card import render_card

from graft_trainer.evaluation.evaluate import Evaluated
from graft_trainer.evaluation.generate import stop_tokens
from graft_trainer.model.adapterfiles import rename_modules
from graft_trainer.model.basemodel import load_config
from graft_trainer.model.methods import as_published, cast_parameters
from graft_trainer.model.wrappers import served_class, serving_names, tuned_class
from graft_trainer.run.failures import Failure, store_failure
from graft_trainer.run.progress import now
from graft_trainer.run.run import Run
from graft_trainer.train import Trained
from graft_trainer.versions.card import add_card, base_fields
from graft_trainer.versions.effect import measure_effect
from graft_trainer.versions.report import finite, write_report
from graft_trainer.versions.tokenizer import add_tokenizer, copy_tokenizer, write_chat_template

log = logging.getLogger(__name__)
SHARD = "5GB"  # largest file of a whole model's weights


def publish(run: Run, trained: Trained, evaluated: Evaluated) -> tuple[Manifest, str]:
    """Upload the version for the operator, who publishes it.

    Return its manifest and the manifest's digest. If another attempt was first, they are its own.
    """
    started = time.monotonic()
    run.progress.stage("Publishing")
    effect = measure_effect(trained)  # before the weights are converted for the files
    folder = run.settings.adapter_dir
    shutil.rmtree(folder, ignore_errors=True)
    save(trained, run.job.base_model, folder)
    template = prompt_template(run.job)
    if trained.method != "full":
        add_tokenizer(trained.folder, folder, trained.tokenizer, template)
    elif template is not None:
        write_chat_template(folder, template, trained.tokenizer)
    weights = versions.describe_files({path.name: path for path in folder.glob("*.safetensors")})
    document = write_report(run, trained, evaluated, folder, weights)

    files = {path.name: path for path in sorted(folder.iterdir())}
    others = versions.describe_files({name: path for name, path in files.items() if not name.endswith(".safetensors")})
    manifest = describe(run, trained, evaluated, [*weights, *others]).model_copy(update={"effect": effect})
    card = render_card(
        manifest,
        license_=run.job.base_model.license,
        auto_class=auto_class(trained),
        datasets=[source.uri for source in (run.job.dataset.train, run.job.dataset.eval) if source is not None],
        report=document,
    )
    manifest = add_card(manifest, card, files, folder)
    try:
        winner, digest = publishing.stage(run.store, run.version_prefix, files, manifest)
    except StoreError as error:
        found = store_failure(error, publishing=True)
        raise Failure(found.reason, found.message, found.remedy) from error
    log.info(
        "staged %s %s: %s, %.1f MB in %.1f s",
        run.job.output.adapter,
        run.job.output.version,
        digest,
        manifest.size_bytes / 1e6,
        time.monotonic() - started,
    )
    return winner, digest


def prompt_template(job: JobFile) -> str | None:
    """Return the template with which the version is measured and served."""
    return job.dataset.templates[0] if job.dataset.templates else None


def auto_class(trained: Trained) -> str:
    """Return the class of transformers that loads the model as it was saved."""
    choose = tuned_class if trained.method == "full" else served_class
    return str(choose(load_config(trained.folder, str(trained.folder)), trained.task).__name__)


def save(trained: Trained, base_model: BaseModelRef, folder: Path) -> None:
    """Write the trained weights in the formats of peft and transformers: an adapter, or a whole model with its
    tokenizer."""
    model = trained.model
    if trained.method != "full":
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        name_as_served(trained, folder)
        reduce_config(folder / "adapter_config.json", base_model)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        return
    cast_parameters(model, trained.stored)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = stop_tokens(trained)  # what evaluation stopped at, engines stop at
    model.save_pretrained(folder, max_shard_size=SHARD)
    as_published(model, trained.stored)
    copy_tokenizer(trained.folder, folder)


def name_as_served(trained: Trained, folder: Path) -> None:
    """Rename the modules of a saved adapter of a multimodal model: servers build the whole model, where the language model
    has another place."""
    if trained.method not in {"lora", "qlora"}:
        return
    base, model = load_config(trained.folder, str(trained.folder)), trained.model
    if (names := serving_names(model.get_base_model(), base, trained.task)) is not None:
        rename_modules(folder, names.outward, map(names.outward, model.base_model.targeted_module_names))


def reduce_config(path: Path, base_model: BaseModelRef | ManifestBaseModel) -> None:
    """Reduce adapter_config.json: no empty fields, no path of this pod, and target_modules in a fixed order."""
    config = {key: value for key, value in json.loads(path.read_text()).items() if value not in (None, {}, [])}
    config |= base_fields(base_model)
    if "prompt_tuning_init" in config:
        # The start of the vectors does not matter after training, and it names a path of this pod.
        config["prompt_tuning_init"] = "RANDOM"
        for start in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
            config.pop(start, None)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def describe(run: Run, trained: Trained, evaluated: Evaluated, files: Iterable[ManifestFile]) -> Manifest:
    """Return the manifest: what the version is, from what it was made, and the digest of every file."""
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
        task=job.task,
        rank=trained.resolved.rank,
        stop_token_ids=stop_tokens(trained),
        prompt_template=prompt_template(job),
        rejected=evaluated.rejected,
        target_modules=trained.targets,
        files=sorted(files, key=lambda file: file.name),
        image=job.trainer_image,
        created_at=now(),
    )
