"""Releases of Graft in one cluster: helm installs, upgrades and rolls back the real chart, and the test runs the code of each
release from its checkout."""

import base64
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from graft.contracts.addresses import host_port
from testbed.binaries import binary
from testbed.controlplane import ControlPlane
from testbed.objectstore import S3Server
from testbed.shell import REPOSITORY, Failed, output

from worlds.cluster.api import Api, Object
from worlds.cluster.loopback import TAINT
from worlds.cluster.operator_process import ACCOUNT, SYSTEM, OperatorProcess
from worlds.cluster.serving_stack import write_kubeconfig
from worlds.cluster.tenant import Tenant

# The version before this one: the last commit of 2026-11-29. After a release, its tag. GRAFT_BEFORE names another commit.
BEFORE = os.environ.get("GRAFT_BEFORE", "8b9c3619f5eb43d35b6464e9e0ca0d3694ad1cfb")
TRAINER = Path(__file__).with_name("trainer.py")


@dataclass(frozen=True)
class Release:
    """The chart and the code of one version."""

    folder: Path
    tag: str

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which Python imports this release."""
        return {"PYTHONPATH": os.pathsep.join(str(self.folder / name) for name in ("operator", "server-image"))}


def present() -> Release:
    return Release(REPOSITORY, "present")


def before(folder: Path) -> Release:
    """Take the version before from the history of the repository. Its packages are those of this version."""
    paths = ("charts", "crds", "operator", "server-image", "requirements")
    found = subprocess.run(["git", "-C", REPOSITORY, "archive", BEFORE, *paths], capture_output=True, check=False)
    if found.returncode != 0:
        raise Failed(
            f"cannot read the commit {BEFORE}, from which the upgrade is tested: {found.stderr.decode().strip()}. "
            "Get the whole history: git fetch --unshallow"
        )
    with tarfile.open(fileobj=BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return Release(folder, "before")


class Installation:
    """The release `graft` of helm in a cluster with simulated nodes, and the object store."""

    def __init__(self, plane: ControlPlane, api: Api, folder: Path, store_port: int) -> None:
        self.plane, self.api, self.folder = plane, api, folder
        self._store_port = store_port

    def upgrade(self, release: Release, *values: str) -> None:
        """Install the chart of a release, or upgrade to it. The pods of the operator and the gateway run in name only."""
        tags = [f"--set=images.{name}.tag={release.tag}" for name in ("operator", "trainer", "engine", "agent")]
        allowed = json.dumps([{"key": "nvidia.com/gpu"}, {"key": TAINT}])
        self.helm(
            "upgrade", "--install", "graft", str(release.folder / "charts/graft"), "--wait", "--timeout=180s", *tags,
            "--set=objectStore.embedded.persistence.enabled=false", f"--set-json=tenants.allowedTolerations={allowed}", *values,
        )  # fmt: skip

    def rollback(self) -> None:
        """Go back to the revision before."""
        self.helm("rollback", "graft", "--wait", "--timeout=180s")

    def helm(self, *arguments: str) -> str:
        return output([binary("helm"), "--kubeconfig", self.plane.kubeconfig, "--namespace", SYSTEM, *arguments])

    def store(self) -> S3Server:
        """Start the embedded store, with the root key that its pod has. Return it."""
        found = self.api.get("StatefulSet", SYSTEM, "graft-store")
        assert found is not None
        (container,) = found["spec"]["template"]["spec"]["containers"]
        key = self._secret(container["env"][0]["valueFrom"]["secretKeyRef"]["name"])
        state = self.folder / "store"
        state.mkdir()
        root = key["access-key-id"], key["secret-access-key"]
        server = S3Server(state, self._store_port, *root, address=self.plane.address)
        server.start()
        return server

    def operator(self, release: Release) -> OperatorProcess:
        """Return the operator as the installed Deployment has it: its configuration, mounted files, variables and rights."""
        config, deployment = (
            self.api.get("ConfigMap", SYSTEM, "graft-config"),
            self.api.get("Deployment", SYSTEM, ACCOUNT),
        )
        assert config is not None and deployment is not None
        pod = deployment["spec"]["template"]["spec"]
        # The cluster has no DNS: the address of the embedded store is that of the server that plays it.
        store = f"http://{host_port(self.plane.address, self._store_port)}"
        data = {
            name: re.sub(r"http://graft-store(-admin)?\.[^:/]+:707[01]", store, text)
            for name, text in config["data"].items()
        }
        folder = self.folder / f"operator-{release.tag}"
        storage = folder / "storage"
        storage.mkdir(parents=True, exist_ok=True)
        for name, text in self._mounted(pod, data).items():
            (storage / name).write_text(text)
        kubeconfig = write_kubeconfig(self.plane, folder / "kubeconfig", self.api.token(SYSTEM, ACCOUNT))
        variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"] if "value" in item}
        variables = {name: value for name, value in variables.items() if name.startswith("GRAFT_")}
        more = {"GRAFT_KEYS_SECONDS": "1"} | release.environment
        process = OperatorProcess(folder, kubeconfig, storage, environment=variables | more)
        process.settings = json.loads(data["config.json"])
        return process

    def _mounted(self, pod: Object, data: dict[str, str]) -> dict[str, str]:
        """Return the files of the operator's volume `storage`."""
        (volume,) = (item for item in pod["volumes"] if item["name"] == "storage")
        files: dict[str, str] = {}
        for source in volume["projected"]["sources"]:
            for item in source.get("configMap", {}).get("items", []):
                files[item["path"]] = data[item["key"]]
            if "secret" in source:
                files |= self._secret(source["secret"]["name"])
        return files

    def _secret(self, name: str) -> dict[str, str]:
        found = self.api.get("Secret", SYSTEM, name)
        assert found is not None, f"the Secret {name} does not exist"
        return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


def train(release: Release, tenant: Tenant, job: str, pod: str, weights: Path, folder: Path) -> None:
    """Play the trainer of a release: it stages the version of a job with the namespace's key. Then its pod ends."""
    storage = folder / f"{job}-storage"
    storage.mkdir()
    tenant.mount_storage(storage)
    file = folder / f"{job}.json"
    file.write_text(tenant.get("ConfigMap", f"{job}-job")["data"]["job.json"])
    command = [sys.executable, TRAINER, storage, file, pod, weights]
    done = subprocess.run(command, env=os.environ | release.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tenant.end_pod(pod)
