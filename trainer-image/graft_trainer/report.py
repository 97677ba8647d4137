"""report.json: the run for people who want to know how the version came to be."""

import math
import platform
from importlib import metadata
from typing import Any

import torch

from graft_trainer.evaluate import Evaluated
from graft_trainer.progress import now
from graft_trainer.run import Run
from graft_trainer.train import Trained

PACKAGES = ("graft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers")


def report(run: Run, trained: Trained, evaluated: Evaluated) -> dict[str, Any]:
    """report.json: the run for people who want to know how the version came to be."""
    job, state, held_out = run.job, run.progress.state, trained.held_out
    return {
        "schemaVersion": 1,
        "job": job.job.model_dump(by_alias=True) | {"attempt": run.settings.attempt},
        "adapter": job.output.adapter,
        "version": job.output.version,
        "baseModel": job.base_model.model_dump(by_alias=True),
        "method": job.method.name,
        "hyperparameters": trained.resolved.wire(),
        "targetModules": trained.targets,
        "trainableParameters": state.trainable_parameters,
        "totalParameters": state.total_parameters,
        "dataset": {
            "digests": trained.digests,
            "train": len(trained.train.examples),
            "truncated": trained.train.truncated,
            "dropped": trained.train.dropped,
            "heldOut": len(held_out.examples) if held_out else 0,
        },
        "metrics": finite(evaluated.metrics),
        "samples": evaluated.samples,
        "lossCurve": trained.curve,
        "tokens": trained.tokens,
        "seconds": {name: round(value, 2) for name, value in trained.seconds.items()},
        "environment": environment(trained),
        "createdAt": now(),
    }


def environment(trained: Trained) -> dict[str, Any]:
    """What it ran on: versions, device and threads."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = trained.device.kind == "cuda"
    return {
        "python": platform.python_version(),
        "packages": packages,
        "device": torch.cuda.get_device_name(0) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
