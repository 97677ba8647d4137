"""Composed and imported versions in a test.

The test creates the Adapter as a user does. It plays the pod that makes the version, or runs the real trainer in its place.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.artifacts import layout
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob, ManifestParent
from graft.artifacts.publishing import stage
from graft.artifacts.versions import describe_files
from graft.contracts.job import VersionFile
from graft.contracts.progress import EXIT_CODES, Reason, Termination

from worlds.cluster.api import Object
from worlds.cluster.tenant import BASE, Tenant


class Maker:
    """One Adapter that is composed or imported."""

    def __init__(self, tenant: Tenant, adapter: str, version: str = "1.0.0") -> None:
        self.tenant, self.adapter, self.version = tenant, adapter, version
        self.name = f"{adapter}-{version}"
        self.command = "compose"

    def manifest(self, **spec: Any) -> Object:
        self.command = "import" if "import" in spec else "compose"
        full = {"adapter": self.adapter, "version": self.version, "baseModel": BASE, "method": "lora"}
        return self.tenant.resource("Adapter", self.name, full | spec)

    def create(self, **spec: Any) -> "Maker":
        self.tenant.api.create(self.manifest(**spec))
        return self

    def compose(self, *parents: str, **compose: Any) -> "Maker":
        method = "full" if compose.get("into") == "base" else "lora"
        return self.create(method=method, compose={"parents": [{"adapter": item} for item in parents]} | compose)

    def until(self, reason: str, timeout: float = 45) -> Object:
        return self.tenant.until("Adapter", self.name, "Ready", reason, timeout)

    def status(self) -> Object:
        return self.tenant.status("Adapter", self.name)

    def running_pod(self, but: tuple[str, ...] = ()) -> str:
        return self.tenant.running_pod(self.name, but, "Adapter")

    def file(self) -> VersionFile:
        """Return the file that tells the pod what to make."""
        data = self.tenant.get("ConfigMap", f"{self.name}-{self.command}")["data"]
        return VersionFile.model_validate_json(data["job.json"])

    def jobs(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.tenant.api.list("Job", self.tenant.name)]

    def publish_as_trainer(self, pod: str) -> None:
        """Stage the files of a composed adapter and its manifest, as the trainer does."""
        file = self.file()
        prefix = layout.adapter_prefix(file.tenant, file.output.adapter, file.output.version)
        given = file.composition.parents if file.composition else []
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")}
            files["adapter_config.json"].write_text(
                json.dumps({"r": 16, "lora_alpha": 32, "peft_type": "LORA", "target_modules": ["q_proj"]})
            )
            files["adapter_model.safetensors"].write_bytes(self.name.encode() * 100)
            base = ManifestBaseModel(name=file.base_model.name, uri=file.base_model.uri, digest=file.base_model.digest)
            parents = [
                ManifestParent(adapter=item.name, version=item.version, digest=item.digest, weight=item.weight)
                for item in given
            ]
            manifest = Manifest(
                adapter=file.output.adapter, version=file.output.version, method=file.method, base_model=base,
                job=ManifestJob(name=file.job.name, namespace=file.job.namespace, uid=file.job.uid, attempt=pod),
                recipe="r", hyperparameters={}, rank=16, target_modules=["q_proj"], parents=parents,
                files=describe_files(files), created_at="2026-01-01T00:00:00Z",
            )  # fmt: skip
            stage(self.tenant.tenant_store(), prefix, files, manifest)

    def end_pod(self, pod: str, exit_code: int = 0, message: str = "") -> None:
        self.tenant.end_pod(pod, exit_code, message, container=self.command)

    def fail_pod(self, pod: str, reason: Reason, message: str, remedy: str) -> None:
        self.end_pod(pod, EXIT_CODES[reason], Termination(reason=reason, message=message, remedy=remedy).json_text())

    def run_trainer(self, folder: Path) -> None:
        """Play the kubelet: mount the ConfigMap and the Secret, run the container's command, and report how it ended."""
        code, said = run_commands(self.tenant, self.running_pod(), self.file().json_text(), folder, [self.command])
        self.end_pod(self.running_pod(), code, said)


def run_training(tenant: Tenant, job: str, folder: Path) -> None:
    """Play the kubelet for the training pod of a FineTuneJob: run prepare and train, and report how train ended."""
    pod = tenant.running_pod(job)
    code, said = run_commands(tenant, pod, tenant.job_file(job).json_text(), folder, ["prepare", "train"])
    tenant.end_pod(pod, code, said)


def run_commands(tenant: Tenant, pod: str, job_file: str, folder: Path, commands: Sequence[str]) -> tuple[int, str]:
    """Run commands of the trainer one after the other, up to the first that fails, with the files that the kubelet mounts.
    Return the last exit code and the termination message."""
    for name in ("storage", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "job.json").write_text(job_file)
    tenant.mount_storage(folder / "storage")
    environment = dict(os.environ) | {
        "POD_NAME": pod,
        "GRAFT_JOB_FILE": str(folder / "job.json"),
        "GRAFT_STORAGE_DIR": str(folder / "storage"),
        "GRAFT_WORK_DIR": str(folder / "work"),
        "GRAFT_TERMINATION_FILE": str(folder / "termination"),
        "GRAFT_STORAGE_PATIENCE": "5",
        "OMP_NUM_THREADS": "1",  # several threads on shared CPUs wait for each other and take many times as long
    }
    code = 0
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "graft_trainer", command],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(done.stdout, done.stderr)
        if code := done.returncode:
            break
    return code, (folder / "termination").read_text() if (folder / "termination").exists() else ""
