"""Start real vLLM with the command and the environment that the operator gives a pod.

The default is vLLM's build for CPUs. If GRAFT_VLLM_PYTHON names a Python that has vLLM for GPUs, that Python is used.
"""

import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.contracts.enginekeys import fingerprint, new_key
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import ENGINE_DIR
from graft.manifests.serving import serving_deployment
from graft.settings import Images, Settings
from graft_server.agent.engine.access import Access
from graft_server.callers import GATEWAY, ROUTES
from testbed.controlplane import free_port
from testbed.shell import REPOSITORY, tail, wait_for

GPU = "GRAFT_VLLM_PYTHON" in os.environ
PYTHON = os.environ.get("GRAFT_VLLM_PYTHON", str(REPOSITORY / "build" / "venv-vllm" / "bin" / "python"))
COMMAND = [PYTHON, str(Path(__file__).parent / "vllm_command.py")]
DTYPE = "float16" if GPU else "float32"  # on GPUs, vLLM's kernels for adapters accept only 16-bit types
SETTINGS = Settings(
    namespace="graft-system", images=Images(trainer="r/t:1", engine="r/e:1", agent="r/a:1", vllm="r/v:1")
)
MODEL = "weights/llama"
MAX_RANK = 8
GATEWAY_KEY = new_key()


class Vllm:
    """One vLLM server of the model in the folder `base`, which can be ended and started again on the same port."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.port = free_port()
        self.access = Access(folder / "access")
        self.access.admit([fingerprint(GATEWAY_KEY)])
        self.log = folder / "vllm.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def headers(self, path: str) -> dict[str, str]:
        """Return the headers of the caller that may use a path: a gateway or the agent."""
        if path in {route for _, route in ROUTES[GATEWAY]}:
            return {"Authorization": f"Bearer {GATEWAY_KEY}"}
        return self.access.headers

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of the pod's engine, with the paths and the port of this machine."""
        replaced = {f"/mnt/pvc/{MODEL}": str(self.base), "0.0.0.0": "127.0.0.1", "8000": str(self.port)}
        return [replaced.get(item, item) for item in engine_container()["command"][1:]]

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of the pod's engine."""
        cpu = {
            "PATH": os.environ["PATH"],
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # With a GPU, the machine's own variables say where CUDA is. HOME is replaced, because the pod's HOME is /tmp and
        # vLLM would leave its caches there.
        environment = dict(os.environ) if GPU else cpu
        for item in engine_container()["env"]:
            environment[item["name"]] = item["value"].replace(ENGINE_DIR, str(self.folder / "access"))
        return environment | {"HOME": str(self.folder)}

    def start(self) -> None:
        """Start vLLM and wait until it answers."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        wait_for(self._answers, 600, "vLLM answers", lambda: tail(self.log))

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, tail(self.log)
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def terminate(self) -> None:
        """Send SIGTERM, as the kubelet does first."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill vLLM and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def engine_container() -> dict[str, Any]:
    """Return the engine's container as the operator makes it, with weights precise enough to compare answers."""
    deployment = AdapterDeployment.model_validate(
        {
            "metadata": {"name": "desk", "namespace": "shop", "uid": "u"},
            "spec": {
                "baseModel": "big",
                "adapters": ["support@^1"],
                "limits": {"maxLoras": 2, "maxLoraRank": MAX_RANK},
                "shutdownSeconds": 60,
            },
        }
    )
    sizing = ServingSizing(engine="vllm", dtype=DTYPE, max_model_len=256, max_num_seqs=8, gpu_memory_percent=50, gpus=1)
    manifest = serving_deployment(deployment, BaseModelRef(name="big", uri=f"pvc://{MODEL}"), SETTINGS, sizing, 1)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(container)
