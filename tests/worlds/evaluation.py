"""Helpers for the tests of the evaluation: runs with a work folder as prepare leaves it, and trained models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.manifest import Manifest, digest
from graft.artifacts.versions import describe_files
from graft.contracts.job import CurrentVersion
from graft_trainer import train as train_module
from graft_trainer.evaluation.evaluate import Evaluated, evaluate
from graft_trainer.run.run import Prepared, Run
from graft_trainer.train import Trained

from worlds.trainer import QUESTIONS, MemoryStore, chat_lines, make_job, make_run, train_prepared

TRAINING = {
    "maxSteps": 60, "learningRate": 0.03, "loggingSteps": 20, "perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 1,
}  # fmt: skip
ASKED = [{"prompt": question, "answer": answer} for question, answer in QUESTIONS.items()]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def prepared(
    root: Path, base: Path, *, files: dict[str, bytes] | None = None, store: MemoryStore | None = None, **changes: Any
) -> Run:
    """Return a run after prepare. `files` are added to the dataset folder and replace files of the same name."""
    run = make_run(root, store or MemoryStore(), make_job(**({"training": TRAINING} | changes)))
    folder = run.settings.dataset_dir
    (folder / "suites").mkdir(parents=True)
    for name, data in ({"train.jsonl": chat_lines(24), "eval.jsonl": chat_lines(6)} | (files or {})).items():
        (folder / name).write_bytes(data)
    Prepared(str(base), {"train": "sha256:train", "eval": "sha256:eval"}).write(run.settings.prepared_file)
    return run


def trained_in(run: Run) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "cpu_limit", lambda: 1)  # a second thread would slow down such a small model
        return train_prepared(run)


def train_and_evaluate(run: Run) -> tuple[Trained, Evaluated]:
    trained = trained_in(run)
    return trained, evaluate(run, trained)


def publish_as(store: MemoryStore, version: str, trained: Trained, run: Run, **changes: Any) -> CurrentVersion:
    """Put a trained model into the store as a version of the adapter, in the layout of publish."""
    folder = run.settings.work_dir / f"published-{version}"
    trained.model.save_pretrained(folder, safe_serialization=True)
    files = {path.name: path for path in folder.iterdir() if path.name != "README.md"}
    manifest = Manifest.model_validate(
        {
            "adapter": "colours",
            "version": version,
            "method": trained.method,
            "baseModel": run.job.base_model.model_dump(),
            "job": {"name": "earlier", "namespace": "team-a", "uid": "uid-0", "attempt": "pod-0"},
            "recipe": "sha256:recipe",
            "hyperparameters": {},
            "files": describe_files(files),
            "createdAt": "2026-01-01T00:00:00Z",
        }
        | changes
    )
    prefix = f"team-a/adapters/colours/{version}/"
    store.kept |= {prefix + name: path.read_bytes() for name, path in files.items()}
    store.kept[prefix + "manifest.json"] = manifest.to_bytes()
    return CurrentVersion(version=version, uri=f"s3://bucket/{prefix}", digest=digest(manifest.to_bytes()))
