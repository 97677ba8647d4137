"""A tenant's namespace in a test: the resources that its user creates and reads, and the training pods that the test plays."""

import base64
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.artifacts import layout
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.publishing import stage
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.artifacts.versions import describe_files
from graft.contracts.job import JobFile
from graft.contracts.progress import EXIT_CODES, Progress, Reason, Termination
from graft.manifests.metadata import OWNER_UID
from graft.manifests.training import is_preflight
from testbed.shell import wait_for

from worlds.cluster.api import Api, Object

API = "graft.dev/v1alpha1"
BASE = "tiny"
# The resources of a test's jobs unless the test sets others. Without GPUs no preflight Job runs before the training.
ON_CPU = {"requests": {"cpu": "1", "memory": "1Gi"}}
SCORES = {"exactMatch": 0.91, "base/exactMatch": 0.12}


@dataclass
class Tenant:
    """One namespace. `store` is opened with the root key."""

    api: Api
    name: str
    store: S3Store

    # Actions of the user.

    def job(self, name: str, adapter: str = "support", **spec: Any) -> Object:
        """Create a FineTuneJob. With resources=None the operator chooses GPUs for it."""
        return self.api.create(self.job_manifest(name, adapter, **spec))

    def job_manifest(self, name: str, adapter: str = "support", **spec: Any) -> Object:
        full = {
            "baseModel": BASE,
            "dataset": {"train": {"uri": f"s3://graft/{self.name}/datasets/train.jsonl"}},
            "method": {"lora": {"rank": 8}},
            "output": {"adapter": adapter},
            "resources": ON_CPU,
        }
        return self.resource(
            "FineTuneJob", name, {key: value for key, value in (full | spec).items() if value is not None}
        )

    def resource(self, kind: str, name: str, spec: Object) -> Object:
        return {"apiVersion": API, "kind": kind, "metadata": {"name": name, "namespace": self.name}, "spec": spec}

    def give_back(self) -> None:
        """Delete jobs and deployments without waiting. Their pods would hold resources that other tests need."""
        for kind in ("FineTuneJob", "AdapterDeployment"):
            for item in self.api.list(kind, self.name):
                self.api.delete(kind, self.name, item["metadata"]["name"])

    # Reads and waits of the user.

    def get(self, kind: str, name: str) -> Object:
        found = self.api.get(kind, self.name, name)
        assert found is not None, f"{kind} {name} does not exist"
        return found

    def status(self, kind: str, name: str) -> Object:
        return dict(self.get(kind, name).get("status") or {})

    def condition(self, kind: str, name: str, type_: str) -> Object:
        """Return a condition of the current generation, or an empty dictionary."""
        found = self.get(kind, name)
        for item in found.get("status", {}).get("conditions", []):
            if item["type"] == type_ and item["observedGeneration"] == found["metadata"]["generation"]:
                return dict(item)
        return {}

    def until(
        self, kind: str, name: str, type_: str, reason: str, timeout: float = 45, *, says: str = "", not_: str = ""
    ) -> Object:
        """Wait until a condition has a reason. Return the condition.

        Its message must also contain `says`, and must not contain `not_`.
        """
        seen: Object = {}

        def there() -> bool:
            seen.update({"kept": self.condition(kind, name, type_)})
            text = seen["kept"].get("message", "")
            return seen["kept"].get("reason") == reason and says in text and not (not_ and not_ in text)

        what = f"{kind} {name}: {type_} has reason {reason}" + (f" and its message contains {says!r}" if says else "")
        self.wait(there, what, timeout, lambda: f"the condition is {seen.get('kept')}")
        return dict(seen["kept"])

    def wait(
        self, predicate: Callable[[], object], what: str, timeout: float = 45, explain: Callable[[], str] = str
    ) -> None:
        wait_for(predicate, timeout, what, explain)

    def gone(self, kind: str, name: str, timeout: float = 60) -> None:
        self.wait(lambda: self.api.get(kind, self.name, name) is None, f"{kind} {name} is deleted", timeout)

    def events(self, name: str) -> list[str]:
        """Return the reasons of the Events about a resource."""
        found = self.api.list("CoreEvent", self.name)
        return [item["reason"] for item in found if item["involvedObject"]["name"] == name]

    def until_events(self, name: str, *reasons: str) -> None:
        """Wait for Events about a resource. The operator does not write them together with the status."""
        self.wait(
            lambda: set(reasons) <= set(self.events(name)),
            f"there are Events {reasons} about {name}",
            explain=lambda: f"the Events are {self.events(name)}",
        )

    # The training pod, played by the test.

    def pods(self, owner: Object) -> list[Object]:
        """Return the pods of a resource, the oldest first."""
        found = self.api.list("Pod", self.name, f"{OWNER_UID}={owner['metadata']['uid']}")
        return sorted(found, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def running_pod(
        self, job: str, but: tuple[str, ...] = (), kind: str = "FineTuneJob", *, preflight: bool = False
    ) -> str:
        """Wait until a training pod of the job runs, or a preflight pod if `preflight` is set. Return its name.

        Pods whose names are in `but` do not count.
        """
        owner = self.get(kind, job)

        def running() -> list[str]:
            of_kind = [pod for pod in self.pods(owner) if is_preflight(pod) == preflight]
            found = [pod for pod in of_kind if pod.get("status", {}).get("phase") == "Running"]
            return [pod["metadata"]["name"] for pod in found if pod["metadata"]["name"] not in but]

        self.wait(running, f"a pod of {job} runs", explain=lambda: json.dumps(self.status(kind, job)))
        return running()[0]

    def job_file(self, job: str) -> JobFile:
        return JobFile.model_validate_json(self.get("ConfigMap", f"{job}-job")["data"]["job.json"])

    def mount_storage(self, folder: Path) -> None:
        """Write the Secret graft-storage as the kubelet mounts it."""
        for key, value in self.get("Secret", "graft-storage")["data"].items():
            (folder / key).write_bytes(base64.b64decode(value))

    def tenant_store(self) -> S3Store:
        """Open the store with the namespace's key, as the pods do."""
        with tempfile.TemporaryDirectory() as folder:
            self.mount_storage(Path(folder))
            return S3Store(StorageConfig.from_dir(folder))

    def progress(self, job: str, pod: str, **fields: Any) -> None:
        """Write progress.json as the trainer does."""
        file = self.job_file(job)
        message = Progress(attempt=pod, updated_at="2026-01-01T00:00:00Z", **fields)
        key = layout.attempt_prefix(file.tenant, file.job.uid, pod) + layout.PROGRESS
        self.tenant_store().put(key, message.json_text().encode())

    def publish_as_trainer(
        self, job: str, pod: str, rank: int = 8, rejected: list[str] | None = None, weights: bytes | None = None
    ) -> str:
        """Stage the version: upload its files and its manifest. Return where the operator publishes it."""
        file = self.job_file(job)
        prefix = layout.adapter_prefix(file.tenant, file.output.adapter, file.output.version)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")}
            files["adapter_config.json"].write_text(
                json.dumps({"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA", "target_modules": ["q_proj"]})
            )
            data = weights if weights is not None else hashlib.sha256(job.encode()).digest() * 512
            files["adapter_model.safetensors"].write_bytes(data)
            base = ManifestBaseModel(name=file.base_model.name, uri=file.base_model.uri, digest=file.base_model.digest)
            manifest = Manifest(
                adapter=file.output.adapter, version=file.output.version, method=file.method.name, base_model=base,
                job=ManifestJob(name=job, namespace=self.name, uid=file.job.uid, attempt=pod), recipe=file.recipe,
                hyperparameters={}, metrics=SCORES, rank=rank, target_modules=["q_proj"], rejected=rejected or [],
                files=describe_files(files), created_at="2026-01-01T00:00:00Z",
            )  # fmt: skip
            stage(self.tenant_store(), prefix, files, manifest)
        return prefix

    def end_pod(
        self, pod: str, exit_code: int = 0, message: str = "", reason: str = "", container: str = "train"
    ) -> None:
        """End the container of a pod. The real Job controller then updates the Job."""
        phase = "Failed" if exit_code else "Succeeded"
        now = self.api.get("Pod", self.name, pod)
        assert now is not None
        started = now["status"]["startTime"]
        terminated = {"exitCode": exit_code, "startedAt": started, "finishedAt": started, "message": message}
        terminated["reason"] = reason or ("Error" if exit_code else "Completed")
        ended = {"name": container, "ready": False, "restartCount": 0, "image": "x", "imageID": "", "started": False}
        status = {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [ended | {"state": {"running": None, "terminated": terminated}}],
        }
        self.api.patch_status("Pod", self.name, pod, status)

    def fail_pod(self, pod: str, reason: Reason, message: str, remedy: str) -> None:
        """End a pod with the trainer's termination message and the exit code of the reason."""
        text = Termination(reason=reason, message=message, remedy=remedy).json_text()
        self.end_pod(pod, EXIT_CODES[reason], text)

    def pass_preflight(self, job: str, **data: Any) -> None:
        """End the preflight pod without an error. `data` are the statistics of the dataset that it reports."""
        pod = self.running_pod(job, preflight=True)
        self.progress(job, pod, stage="Preparing", dataset=data)
        self.end_pod(pod, container="prepare")

    def trained(
        self, job: str, adapter: str = "support", rank: int = 8, weights: bytes | None = None, **spec: Any
    ) -> str:
        """Play a whole run, from the job to its verified Adapter. Return the Adapter's name."""
        self.job(job, adapter, **spec)
        pod = self.running_pod(job)
        self.publish_as_trainer(job, pod, rank, weights=weights)
        self.end_pod(pod)
        self.until("FineTuneJob", job, "Succeeded", "Published")
        return str(self.status("FineTuneJob", job)["adapterRef"]["name"])
