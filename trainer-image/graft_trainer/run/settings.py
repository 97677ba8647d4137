"""The paths of the pod: the mounts of graft.contracts. Tests can change each path with an environment variable."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.contracts import mounts


@dataclass(frozen=True)
class Settings:
    """The pod's paths and the name of this attempt."""

    attempt: str
    job_file: Path
    storage_dir: Path
    hf_token_file: Path
    work_dir: Path
    pvc_dir: Path
    configmap_dir: Path
    termination_file: Path
    progress_interval: float = 5.0  # seconds between uploads of progress.json
    storage_patience: float = 180.0  # seconds for which calls to an unavailable store are retried
    checkpoint_seconds: float = 300.0  # seconds between checkpoints, if training.saveSteps is not set

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Settings":
        def path(name: str, default: str) -> Path:
            return Path(env.get(name, default))

        return cls(
            attempt=env.get("POD_NAME", "attempt"),
            job_file=path("GRAFT_JOB_FILE", mounts.JOB_FILE),
            storage_dir=path("GRAFT_STORAGE_DIR", mounts.STORAGE_DIR),
            hf_token_file=path("GRAFT_HF_TOKEN_FILE", mounts.HF_TOKEN_FILE),
            work_dir=path("GRAFT_WORK_DIR", mounts.WORK_DIR),
            pvc_dir=path("GRAFT_PVC_DIR", mounts.PVC_DIR),
            configmap_dir=path("GRAFT_CONFIGMAP_DIR", mounts.CONFIGMAP_DIR),
            termination_file=path("GRAFT_TERMINATION_FILE", "/dev/termination-log"),
            progress_interval=float(env.get("GRAFT_PROGRESS_INTERVAL", "5")),
            storage_patience=float(env.get("GRAFT_STORAGE_PATIENCE", "180")),
            checkpoint_seconds=float(env.get("GRAFT_CHECKPOINT_SECONDS", "300")),
        )

    @property
    def base_model_dir(self) -> Path:
        return self.work_dir / "base-model"

    @property
    def dataset_dir(self) -> Path:
        return self.work_dir / "dataset"

    @property
    def prepared_file(self) -> Path:
        """The file in which prepare passes its results to train."""
        return self.work_dir / "prepared.json"

    @property
    def adapter_dir(self) -> Path:
        return self.work_dir / "adapter"

    def hf_token(self) -> str | None:
        """Return the tenant's Hugging Face token, or None if the namespace has none."""
        if not self.hf_token_file.is_file():
            return None
        return self.hf_token_file.read_text().strip() or None


# How often a thread of torch checks for new work before it sleeps. A step has thousands of parallel parts, so threads
# that sleep at once take a quarter longer for it. By default they spin 300,000 times, and if CPUs are shared or
# throttled, that slows a step down many times over.
SPINS = "10000"


def library_environment(work_dir: Path, *, offline: bool) -> dict[str, str]:
    """Return the environment variables that must be set before the libraries are imported.

    The root file system is read-only, so caches are in the work folder. Training reads local files only. With
    `offline`, transformers does not ask the Hub about them.
    """
    cache = work_dir / "cache"
    values = {
        "HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS),
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }
    return values | ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {})
