"""A cluster with one real node.

It outlives the program that starts it. Its deletion leaves nothing on the host but caches.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from testbed import images, packages, policies, traces
from testbed.binaries import binary, build
from testbed.controlplane import ControlPlane
from testbed.node import NODE, Network, Node, both
from testbed.shell import CACHE, Failed, output, say, step, wait_for

NUMBERS = {"demo": 0, "e2e": 1}
API_PORT = 6443


@dataclass
class Cluster:
    """The cluster with a given name. Its state is below the cache folder."""

    name: str

    @property
    def state(self) -> Path:
        return CACHE / "clusters" / self.name

    @property
    def network(self) -> Network:
        return Network(self.name, NUMBERS.get(self.name, 2 + sum(self.name.encode()) % 90))

    @property
    def plane(self) -> ControlPlane:
        network = self.network
        return ControlPlane(
            self.state, address=network.node, netns=network.netns, service_cidr=both(network.services, network.services_ipv6),
            kubernetes_ip=network.service(1), api_port=API_PORT,
        )  # fmt: skip

    @property
    def node(self) -> Node:
        return Node(self.plane, self.network, CACHE / "containerd" / self.name)

    @property
    def kubeconfig(self) -> Path:
        return self.plane.kubeconfig

    def running(self) -> bool:
        """Return whether the API server of this cluster answers."""
        if not all(self.plane.processes.alive(name) for name in ("kube-apiserver", "kubelet", policies.ENGINE)):
            return False
        return self.plane.kubectl("get", "--raw", "/readyz", check=False).strip() == "ok"

    def up(self) -> None:
        """Start the cluster if it is not running."""
        packages.install(packages.NODE)
        build(["kube", "pause", "coredns", policies.ENGINE])
        if self.running():
            say(f"    cluster {self.name} is already running")
            return
        self.down()
        self.state.mkdir(parents=True, exist_ok=True)
        with step(f"starting cluster {self.name}"):
            self.network.up()
            self.plane.start()
            self.node.start_containerd()
            self._stop_pods()  # containerd's folder is kept, and may list pods of an interrupted cluster
            images.load_scratch(self.node, "localhost/graft/pause:1", binary("pause"), ["/pause"])
            policies.enforce(self.plane, self.network, NODE)
            with traces.settings_kept(self.state, lambda: self.plane.processes.stop("kubelet")):
                self.node.start()
            self._volume()

    def _volume(self) -> None:
        """Create one volume for the chart's object store: a folder of the host that any user may write."""
        folder = self.state / "volumes" / "store"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        storage_class = {
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "testbed"},
            "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer",
        }  # fmt: skip
        volume = {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "testbed-store"},
            "spec": {
                "capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "testbed",
                "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": str(folder), "type": "Directory"},
            },
        }  # fmt: skip
        manifest = self.state / "volume.json"
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [storage_class, volume]}))
        self.plane.kubectl("apply", "-f", str(manifest))

    def down(self) -> None:
        """End everything. The kubelet ends first, so that it starts nothing again, then the pods, then the rest."""
        processes = self.plane.processes
        for name in ("kubelet", "kube-proxy", "coredns"):
            processes.stop(name)
        processes.stop(policies.ENGINE, timeout=0.5)  # it waits for 5 s before it ends, and has nothing to save
        if processes.alive("containerd"):
            self._stop_pods()
        for name in reversed(processes.names()):
            processes.stop(name)
        self._stop_shims()
        self._unmount()
        self.node.remove_cgroups()
        self.network.down()
        traces.remove(self.state, self.network.netns)
        shutil.rmtree(self.state, ignore_errors=True)
        if self.state.exists():
            raise Failed(
                f"cannot remove {self.state}: a process still uses it. End that process, then run the command again"
            )

    def _stop_pods(self) -> None:
        node = self.node
        tasks = output(node.ctr("tasks", "ls", "-q"), check=False).split()
        for task in tasks:
            output(node.ctr("tasks", "kill", "-s", "SIGKILL", "-a", task), check=False)
        for task in tasks:
            output(node.ctr("tasks", "rm", "-f", task), check=False)
        for container in output(node.ctr("containers", "ls", "-q"), check=False).split():
            output(node.ctr("containers", "rm", container), check=False)

    def _stop_shims(self) -> None:
        """Kill the shims whose task did not end in time. The socket of our containerd on their command line identifies them."""
        from testbed.processes import start_time

        marker = f"{self.node.socket}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"containerd-shim" in command and marker in command:
                pid = int(entry.name)
                output(["kill", "-9", str(pid)], check=False)
                wait_for(lambda pid=pid: start_time(pid) is None, 10, f"shim {pid} ended")  # type: ignore[misc]

    def _unmount(self) -> None:
        """Unmount everything below the state folder, innermost mounts first."""
        prefix = f"{self.state}/"
        for _ in range(5):
            points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
            ours = sorted((point for point in points if point.startswith(prefix)), key=len, reverse=True)
            if not ours:
                return
            for point in ours:
                output(["umount", "-l", point], check=False)
