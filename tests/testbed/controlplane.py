"""etcd, kube-apiserver, controllers and scheduler as processes. The operator's tests need no real node besides them."""

import contextlib
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.contracts.addresses import host_port

from testbed import packages, pki
from testbed.binaries import binary, kubectl
from testbed.processes import Processes
from testbed.shell import tail, wait_for

SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_IP = "10.96.0.1"
SERVICE_CIDR_IPV6 = "fd00:10:96::/112"
# The API server records each request of a service account outside of kube-system when it has answered the request.
AUDITED = {
    "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
    ],
}  # fmt: skip


def free_port() -> int:
    """Return a TCP port on loopback on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ControlPlane:
    """One control plane. It keeps its state below `state` and listens on `address`."""

    state: Path
    address: str = "127.0.0.1"
    netns: str | None = None
    service_cidr: str = SERVICE_CIDR
    kubernetes_ip: str = KUBERNETES_IP
    pod_cidr: str | None = None
    api_port: int = 0
    audited: bool = False  # whether the API server writes `audit_log`
    etcd_port: int = 0

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def server(self) -> str:
        return f"https://{host_port(self.address, self.api_port)}"

    @property
    def audit_log(self) -> Path:
        """Return the file with the requests that the API server has answered, one JSON document a line, if `audited`."""
        return self.state / "logs" / "audit.log"

    @property
    def processes(self) -> Processes:
        return Processes(self.state, self.state / "logs")

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """Run kubectl as the cluster's admin. Return its output."""
        return kubectl(self.kubeconfig, *arguments, check=check)

    def start(self) -> None:
        """Create the certificates, start the processes, and wait until the API server and the controllers answer."""
        self.api_port = self.api_port or free_port()
        keys = self.state / "pki"
        pki.authority(keys)
        pki.certificate(keys, "apiserver", "/CN=kube-apiserver", (self.address, "127.0.0.1", self.kubernetes_ip, "kubernetes", "kubernetes.default.svc", "localhost"))  # fmt: skip
        pki.certificate(keys, "admin", "/O=system:masters/CN=admin")
        for name in ("controller-manager", "scheduler"):
            pki.certificate(keys, name, f"/CN=system:kube-{name}")
            pki.kubeconfig(keys, name, self.server, keys / f"{name}.kubeconfig")
        pki.kubeconfig(keys, "admin", self.server, self.kubeconfig)
        self._start_etcd_and_api()
        pods = [f"--cluster-cidr={self.pod_cidr}", "--allocate-node-cidrs"] if self.pod_cidr else []
        self.processes.start(
            "kube-controller-manager",
            [
                binary("kube-controller-manager"), f"--kubeconfig={keys}/controller-manager.kubeconfig", "--leader-elect=false",
                f"--service-account-private-key-file={keys}/sa.key", f"--root-ca-file={keys}/ca.crt",
                "--use-service-account-credentials", f"--service-cluster-ip-range={self.service_cidr}", "--secure-port=0",
                # The garbage collector would delete thousands of objects with 20 requests a second.
                "--node-monitor-grace-period=40s", "--kube-api-qps=1000", "--kube-api-burst=2000", *pods,
            ],
            netns=self.netns,
        )  # fmt: skip
        self.processes.start(
            "kube-scheduler",
            [
                binary("kube-scheduler"),
                f"--kubeconfig={keys}/scheduler.kubeconfig",
                "--leader-elect=false",
                "--secure-port=0",
            ],
            netns=self.netns,
        )
        wait_for(
            lambda: "default" in self.kubectl("get", "serviceaccount", "-n", "default", check=False),
            60, "the controllers run", lambda: tail(self.state / "logs/kube-controller-manager.log"),
        )  # fmt: skip

    def _start_etcd_and_api(self) -> None:
        keys, etcd, peers = self.state / "pki", free_port(), free_port()
        self.etcd_port = etcd
        audit = []
        if self.audited:
            policy = self.state / "audit-policy.json"
            policy.write_text(json.dumps(AUDITED))
            audit = [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]
        self.processes.start(
            "etcd",
            [
                binary("etcd"), f"--data-dir={self.state}/etcd", f"--listen-client-urls=http://127.0.0.1:{etcd}",
                f"--advertise-client-urls=http://127.0.0.1:{etcd}", f"--listen-peer-urls=http://127.0.0.1:{peers}",
                "--unsafe-no-fsync", "--log-level=warn",
            ],
            netns=self.netns,
        )  # fmt: skip
        self.processes.start("kube-apiserver", [
            binary("kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={self.api_port}",
            f"--bind-address={self.address}", f"--advertise-address={self.address}", "--endpoint-reconciler-type=" + ("lease" if self.netns else "none"),
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={keys}/sa.pub",
            f"--service-account-signing-key-file={keys}/sa.key", f"--client-ca-file={keys}/ca.crt",
            f"--tls-cert-file={keys}/apiserver.crt", f"--tls-private-key-file={keys}/apiserver.key",
            f"--kubelet-client-certificate={keys}/admin.crt", f"--kubelet-client-key={keys}/admin.key",
            "--kubelet-preferred-address-types=InternalIP", "--authorization-mode=Node,RBAC", "--allow-privileged",
            f"--service-cluster-ip-range={self.service_cidr}",
            *audit,
        ], netns=self.netns)  # fmt: skip
        wait_for(
            lambda: self.kubectl("get", "--raw", "/readyz", check=False).strip() == "ok",
            60, "the API server answers", lambda: tail(self.state / "logs/kube-apiserver.log"),
        )  # fmt: skip

    def stop(self) -> None:
        """End the processes, the last started first."""
        for name in reversed(self.processes.names()):
            self.processes.stop(name)


@contextlib.contextmanager
def control_plane(**fields: Any) -> Iterator[ControlPlane]:
    """Run a control plane with its own state folder during the block. Delete both afterwards. `fields`: of ControlPlane."""
    packages.install(packages.CONTROL_PLANE)
    state = Path(tempfile.mkdtemp(prefix="graft-controlplane-"))
    plane = ControlPlane(state, **fields)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()
        shutil.rmtree(state, ignore_errors=True)
