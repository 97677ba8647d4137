"""Stage the version of a job as its trainer does, with the code of the release that PYTHONPATH names.

Arguments: the mounted Secret of the store, the job file, the name of the pod, and the folder with the adapter's files.
"""

import sys
from pathlib import Path

from graft.artifacts import layout
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.publishing import stage
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.artifacts.versions import describe_files
from graft.contracts.job import JobFile

FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(storage: str, file: str, pod: str, folder: str) -> None:
    """Upload the files and the manifest."""
    job = JobFile.model_validate_json(Path(file).read_text())
    files = {name: Path(folder) / name for name in FILES}
    made = Manifest(
        adapter=job.output.adapter, version=job.output.version, method=job.method.name,
        base_model=ManifestBaseModel(name=job.base_model.name, uri=job.base_model.uri, digest=job.base_model.digest),
        job=ManifestJob(name=job.job.name, namespace=job.job.namespace, uid=job.job.uid, attempt=pod), recipe=job.recipe,
        hyperparameters={}, metrics={"exactMatch": 0.9}, rank=4, target_modules=["q_proj"],
        files=describe_files(files), created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    prefix = layout.adapter_prefix(job.tenant, job.output.adapter, job.output.version)
    stage(S3Store(StorageConfig.from_dir(storage)), prefix, files, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
