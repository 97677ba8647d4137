"""report.json and report.html: how the version was made, for people."""

import math
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from graft.artifacts.manifest import ManifestFile
from graft.report.document import (
    DatasetUse,
    Environment,
    EvaluationUse,
    Report,
    ReportJob,
    Resources,
    SuiteUse,
)
from graft.report.job import render_job

from graft_trainer.analysis.analysis import analyse
from graft_trainer.evaluation.evaluate import Evaluated
from graft_trainer.run.progress import now
from graft_trainer.run.run import Run
from graft_trainer.train import Trained

PACKAGES = ("graft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "lm_eval")
SUITE_SAMPLES = 3  # number of answers that the report shows of each suite
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def write_report(
    run: Run, trained: Trained, evaluated: Evaluated, folder: Path, weights: Sequence[ManifestFile] = ()
) -> Report:
    """Analyse the model and write both reports into `folder`, beside the version's weights. Return the document.

    `weights`: the files with weights, with their digests.
    """
    started = time.monotonic()
    analysis = analyse(trained)
    seconds = trained.seconds | {"evaluate": evaluated.seconds, "analyse": time.monotonic() - started}
    document = report(run, trained, evaluated, folder).model_copy(
        update={
            "analysis": analysis,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "weights": {file.name: file.sha256 for file in weights},
        }
    )
    text = document.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT_HTML).write_text(render_job(document), encoding="utf-8")
    return document


def report(run: Run, trained: Trained, evaluated: Evaluated, folder: Path) -> Report:
    """Return the document without the analysis and the seconds. docs/reports.md describes it."""
    job, state = run.job, run.progress.state
    return Report(
        job=ReportJob(
            **job.job.model_dump(),
            attempt=run.settings.attempt,
            resumed_from=state.resumed_from,
            checkpoints=len(state.checkpoints or ()),
            halvings=run.halvings,
        ),
        adapter=job.output.adapter,
        version=job.output.version,
        base_model=job.base_model,
        task=job.task,
        method=job.method.name,
        recipe=job.recipe,
        hyperparameters=trained.resolved.wire(),
        target_modules=trained.targets,
        trainable_parameters=state.trainable_parameters,
        total_parameters=state.total_parameters,
        dataset=DatasetUse(
            digests=trained.digests,
            train=len(trained.train_examples),
            truncated=trained.train.truncated,
            dropped=trained.train.unusable.total,
            held_out=len(trained.held_out_examples),
            statistics=state.dataset,
        ),
        evaluation=EvaluationUse(
            suites=[
                SuiteUse(name=suite.name, role=suite.role, size=suite.size, main=suite.main)
                for suite in evaluated.suites
            ],
            gates=job.evaluation.gates or [],
            rejected=evaluated.rejected,
            missing=evaluated.missing,
        ),
        metrics=finite(evaluated.metrics),
        precision=evaluated.precision,
        samples=evaluated.samples
        + [{"suite": suite.name} | sample for suite in evaluated.suites for sample in suite.samples[:SUITE_SAMPLES]],
        loss_curve=loss_curve(trained, evaluated),
        tokens=trained.tokens,
        learned_tokens=trained.learned_tokens,
        resources=Resources(
            peak_memory_bytes=trained.peak_memory_bytes,
            tokens_per_second=state.tokens_per_second,
            published_bytes=weights_size(folder),
            base_bytes=weights_size(trained.folder),
            quantized_bytes=quantized_size(trained.model) if trained.method == "qlora" else None,
        ),
        environment=environment(run, trained),
        created_at=now(),
    )


def loss_curve(trained: Trained, evaluated: Evaluated) -> list[dict[str, float]]:
    """Return the records of the training loss and of the held-out loss by step. The evaluation measures the last one."""
    records = [*trained.curve, *trained.held_out_curve]
    if "evalLoss" in evaluated.metrics:
        records.append({"step": trained.resolved.max_steps, "evalLoss": evaluated.metrics["evalLoss"]})
    return sorted(map(finite, records), key=lambda record: record["step"])


def weights_size(folder: Path) -> int:
    """Return the size of the safetensors files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantized_size(model: Any) -> int:
    """Return the size of the quantized base model in bytes: 4-bit weights, their quantization constants, and the rest
    in 16 bits.

    The server uses 16 bits for the weights that are not quantized.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is None:
            total += 2 * parameter.numel()
            continue
        constants = [state.absmax, state.code]
        if state.nested:
            constants += [state.state2.absmax, state.state2.code]
        total += parameter.nbytes + sum(constant.nbytes for constant in constants)
    return total


def environment(run: Run, trained: Trained) -> Environment:
    """Return the environment of the run: versions, device and threads."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = trained.device.kind == "cuda"
    return Environment(
        python=platform.python_version(),
        packages=packages,
        device=torch.cuda.get_device_name(0) if gpu else cpu_name(),
        device_memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpu else None,
        threads=torch.get_num_threads(),
        world_size=run.progress.state.world_size or 1,
        image=run.job.trainer_image,
    )


def cpu_name() -> str:
    """Return the name of the CPU, or its architecture if the kernel does not know the name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return only the finite metrics, because JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
