"""The operator as a process with the chart's rights. The tests start, stop and kill it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from graft.api.meta import GPU
from testbed.binaries import binary
from testbed.controlplane import ControlPlane, free_port
from testbed.objectstore import S3Server
from testbed.shell import REPOSITORY, output, tail, wait_for

from worlds.cluster.api import Api, Object
from worlds.cluster.loopback import TAINT

SYSTEM = "graft-system"
ACCOUNT = "graft-operator"
BUCKET = "graft"
RIGHTS = {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}


@dataclass
class OperatorProcess:
    """The process `python -m graft`, with a kubeconfig, a configuration and the root key of the store."""

    folder: Path
    kubeconfig: Path
    secret_dir: Path
    health_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    python: str = sys.executable
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=lambda: {"GRAFT_KEYS_SECONDS": "1"})
    settings: Object = field(default_factory=lambda: SETTINGS)

    @property
    def log(self) -> Path:
        return self.folder / "operator.log"

    def start(self) -> None:
        """Start the operator and wait until its health probe succeeds. If it does not, the process is ended."""
        self.launch()
        try:
            wait_for(self.healthy, 180, "the operator is healthy", lambda: tail(self.log))
        except BaseException:
            self.kill9()
            raise

    def launch(self) -> None:
        """Start the operator without waiting."""
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "graft"],
                env=os.environ | self.variables(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def variables(self) -> dict[str, str]:
        """Write the configuration. Return the variables that the operator reads."""
        config = self.folder / "config.json"
        config.write_text(json.dumps(self.settings))
        return self.environment | {
            "KUBECONFIG": str(self.kubeconfig),
            "GRAFT_CONFIG": str(config),
            "GRAFT_STORAGE_DIR": str(self.secret_dir),
            "GRAFT_LIVENESS": f"http://127.0.0.1:{self.health_port}/healthz",
            "GRAFT_METRICS_PORT": str(self.metrics_port),
        }

    def healthy(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (
            f"the operator ended unexpectedly. The last lines of its log:\n{tail(self.log)}"
        )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/healthz", timeout=5):
                return True
        except OSError:
            return False

    def leads(self) -> bool:
        """Return whether the operator says that it leads. Its probe repeats an answer for some seconds, its metric does not."""
        try:
            return self.metric("graft_leader") == 1
        except OSError:
            return False  # it does not answer yet

    def end(self, number: signal.Signals) -> None:
        """Send a signal to the operator and wait until it ends."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    def kill9(self) -> None:
        self.end(signal.SIGKILL)

    def metric(self, name: str, *labels: str) -> float:
        """Return the sum of the series of a metric that have all these labels, each as in `stage="Training"`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        of_name = [line.rpartition(" ") for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(value) for series, _, value in of_name if all(label in series for label in labels))


SETTINGS = {
    "namespace": SYSTEM,
    "images": {"trainer": "graft/trainer:test", "engine": "graft/engine:test", "agent": "graft/agent:test"},
    "storage": {"issueCredentials": True, "createBucket": True},
    "prometheusUrl": "http://prometheus:9090",
    "gatewayUrl": "http://graft-gateway.graft-system.svc:8080",
    "tenantsEnabled": True,
    "allowed": {"priorityClasses": ["patient"], "tolerations": [{"key": GPU}, {"key": TAINT}]},
}


def from_chart(kinds: Collection[str], **values: str) -> list[Object]:
    """Return the chart's objects of some kinds, without those of hooks. `values`: path with __ instead of dots -> value."""
    chart = REPOSITORY / "charts/graft"
    options = [f"--set={path.replace('__', '.')}={value}" for path, value in values.items()]
    command = [
        binary("helm"),
        "template",
        "graft",
        chart,
        "--namespace",
        SYSTEM,
        *options,
    ]
    rendered = output(command)
    documents = [item for item in yaml.safe_load_all(rendered) if item and item["kind"] in kinds]
    return [item for item in documents if "helm.sh/hook" not in (item["metadata"].get("annotations") or {})]


def install_rights(plane: ControlPlane, api: Api) -> Path:
    """Install the operator's account and roles from the chart, and nothing else of it. Return the account's kubeconfig."""
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    manifest = plane.state / "rights.json"
    manifest.write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": from_chart(RIGHTS, tenants__enabled="true")})
    )
    plane.kubectl("apply", "-f", str(manifest))
    path = plane.state / "operator.kubeconfig"
    cluster = {"server": plane.server, "certificate-authority": str(plane.state / "pki/ca.crt")}
    context = {"cluster": "graft", "user": ACCOUNT}
    path.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "graft",
            "clusters": [{"name": "graft", "cluster": cluster}],
            "contexts": [{"name": "graft", "context": context}],
            "users": [{"name": ACCOUNT, "user": {"token": api.token(SYSTEM, ACCOUNT)}}],
        })
    )  # fmt: skip
    return path


def new_operator(folder: Path, kubeconfig: Path, s3: S3Server) -> OperatorProcess:
    """Return an operator that is not started yet."""
    return OperatorProcess(folder, kubeconfig, s3.secret_dir(BUCKET))
