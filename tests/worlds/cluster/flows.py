"""Flows between real pods: pods that try to connect, listeners inside and outside of the cluster, and what came of it."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import product
from testbed.node import IPV6, Network
from testbed.quickstart import Access
from testbed.shell import output, wait_for

Manifest = dict[str, Any]
OPEN = "open"  # the target answered
DROPPED = "dropped"  # nothing came back, neither an answer nor an error: how the policy engine refuses

# Tries every flow of the JSON list argv[1] ([protocol, address, port]) at the same time. Prints the list of outcomes.
PROBE = """
import concurrent.futures, json, socket, sys
def attempt(flow):
    protocol, address, port = flow
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as connection:
        connection.settimeout(3)
        try:
            connection.connect((address, port))
            if protocol == "UDP":
                connection.send(b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\0\\0\\1\\0\\1")  # a query for the root's address
                connection.recv(512)
        except TimeoutError:
            return "dropped"
        except OSError as error:
            return str(error)
    return "open"
flows = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(len(flows)) as pool:
    print(json.dumps(list(pool.map(attempt, flows))))
"""

# Accepts TCP on every port of the JSON list argv[1] at all addresses. Answers UDP on port 53 of each of the other arguments.
LISTENER = """
import json, selectors, socket, sys
selector = selectors.DefaultSelector()
for port in json.loads(sys.argv[1]):
    server = socket.create_server(("::", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
    selector.register(server, selectors.EVENT_READ)
for address in sys.argv[2:]:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    selector.register(server, selectors.EVENT_READ)
print("listening", flush=True)
while True:
    for key, _ in selector.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            key.fileobj.accept()[0].close()
        else:
            data, address = key.fileobj.recvfrom(512)
            key.fileobj.sendto(data, address)
"""


@dataclass(frozen=True)
class Flow:
    """One attempt to connect, and whether a policy must let it pass. `source` and `target` are names of a table."""

    source: str
    target: str
    port: int
    allowed: bool
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{self.source} {'->' if self.allowed else '-x'} {self.target}:{self.port}/{self.protocol}"


@dataclass(frozen=True)
class Pod:
    """A running container of a pod."""

    access: Access
    namespace: str
    name: str
    container: str

    def addresses(self) -> list[str]:
        """Return the pod's addresses, the IPv4 address first."""
        status = self.access.get("pod", self.name, self.namespace)["status"]
        return [item["ip"] for item in status["podIPs"]]

    def python(self, script: str, *arguments: str) -> str:
        """Run a Python program in the container. Return its output."""
        command = [
            "exec",
            "-n",
            self.namespace,
            self.name,
            "-c",
            self.container,
            "--",
            "python",
            "-c",
            script,
            *arguments,
        ]
        return self.access.kubectl(*command)

    def attempt(self, flows: Sequence[tuple[str, str, int]]) -> list[str]:
        """Try flows (protocol, address, port) from the container. Return their outcomes."""
        return [str(item) for item in json.loads(self.python(PROBE, json.dumps(flows)))]


@dataclass(frozen=True)
class Namespace:
    """A network namespace: of the node, or of a pod whose image has no Python."""

    net: str  # a file of the namespace

    def attempt(self, flows: Sequence[tuple[str, str, int]]) -> list[str]:
        """Try flows (protocol, address, port) from the namespace, as root. Return their outcomes."""
        command = ["nsenter", f"--net={self.net}", sys.executable, "-c", PROBE, json.dumps(flows)]
        return [str(item) for item in json.loads(output(command))]


def namespace_of(ctr: list[str], container_id: str) -> Namespace:
    """Return the network namespace of a container. `ctr` is the command line that lists tasks: name, pid, status."""
    for line in output(ctr).splitlines():
        name, pid, _ = line.split()
        if name == container_id:
            return Namespace(f"/proc/{pid}/ns/net")
    raise AssertionError(f"container {container_id} does not run")


def pod_manifest(namespace: str, name: str, ports: Sequence[int], labels: dict[str, str]) -> Manifest:
    """Return a pod that listens on some ports, and from which flows are tried."""
    closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    identity = {"runAsUser": 65532, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    # Ports below 1024 need no right in a pod's network namespace with this setting.
    low = {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]}
    container = {
        "name": "main", "image": product.TAGS["agent"], "imagePullPolicy": "Never", "securityContext": closed,
        "command": ["python", "-c", LISTENER, json.dumps(list(ports))],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
    }  # fmt: skip
    spec = {
        "containers": [container], "securityContext": identity | low, "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
    }  # fmt: skip
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": spec,
    }  # fmt: skip


def default_deny(namespace: str) -> Manifest:
    """Return the policy of a strict platform team: no pod of the namespace sends or receives, unless another policy
    allows it."""
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "default-deny", "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
    }  # fmt: skip


def apply(access: Access, *manifests: Manifest) -> None:
    """Apply manifests."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
    command = [str(access.kubectl_path), "--kubeconfig", access.kubeconfig, "apply", "-f", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def outside(network: Network, addresses: Sequence[str], ports: Sequence[int], log: Path) -> Iterator[None]:
    """Answer at addresses outside of the cluster during the block: a network namespace behind the node, with a listener.

    The node routes the addresses there, so they are never reached from, or added to, the machine itself.
    """
    name, link = f"{network.netns}-outside", f"gr{network.number}o"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # of an interrupted run

    def ip(*arguments: str) -> None:
        output(["ip", *arguments])

    ip("netns", "add", name)
    try:
        ip("-n", network.netns, "link", "add", link, "type", "veth", "peer", "name", "node", "netns", name)
        for namespace, device, host in ((network.netns, link, 1), (name, "node", 2)):
            ip("-n", namespace, "addr", "add", f"198.18.0.{host}/30", "dev", device)
            if IPV6:
                ip("-n", namespace, "addr", "add", f"fd98:18::{host}/64", "dev", device, "nodad")
            ip("-n", namespace, "link", "set", device, "up")
        ip("-n", name, "link", "set", "lo", "up")
        for address in addresses:
            bits, gateway = ("128", "fd98:18::2") if ":" in address else ("32", "198.18.0.2")
            ip("-n", name, "addr", "add", f"{address}/{bits}", "dev", "lo")
            ip("-n", network.netns, "route", "add", f"{address}/{bits}", "via", gateway)
        ip("-n", name, "route", "add", "default", "via", "198.18.0.1")
        if IPV6:
            ip("-n", name, "-6", "route", "add", "default", "via", "fd98:18::1")
        with log.open("w") as sink:
            command = ["nsenter", f"--net=/run/netns/{name}", sys.executable, "-c", LISTENER, json.dumps(list(ports))]
            command += addresses
            process = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            wait_for(lambda: "listening" in log.read_text(), 20, "the listener outside listens", log.read_text)
            yield
        finally:
            process.kill()
            process.wait()
    finally:
        ip("netns", "del", name)  # the link and its routes are deleted with it
