"""One real node in a network namespace: containerd, CNI, kubelet, kube-proxy and CoreDNS.

The namespace holds the bridge, the routes and kube-proxy's iptables chains. They are deleted with it, and two clusters do
not affect each other. Cgroups and mounts belong to the host: the cgroup root and the state folder have the cluster's name.
"""

import json
import socket
from dataclasses import dataclass
from pathlib import Path

from testbed import pki
from testbed.binaries import binary
from testbed.controlplane import ControlPlane
from testbed.shell import output, tail, wait_for

NODE = "node-0"
PAUSE_IMAGE = "localhost/graft/pause:1"
CGROUPS = Path("/sys/fs/cgroup")
IPV6 = Path("/proc/sys/net/ipv6").exists()  # the kernel has it


@dataclass
class Network:
    """The addresses of one cluster. Each cluster has another `number` (0 to 99)."""

    name: str
    number: int

    @property
    def netns(self) -> str:
        return f"graft-{self.name}"

    @property
    def host(self) -> str:
        return f"10.210.{self.number}.1"

    @property
    def node(self) -> str:
        return f"10.210.{self.number}.2"

    @property
    def pods(self) -> str:
        return f"10.{110 + self.number}.0.0/16"

    # If the kernel has IPv6, the host, the node, pods and Services have addresses of both families. IPv4 comes first.

    @property
    def host_ipv6(self) -> str:
        return f"fd10:210:{self.number}:1::1"

    @property
    def node_ipv6(self) -> str:
        return f"fd10:210:{self.number}:1::2"

    @property
    def pods_ipv6(self) -> str:
        return f"fd10:210:{self.number}::/64"

    @property
    def services_ipv6(self) -> str:
        return f"fd10:210:{self.number}:2::/112"

    @property
    def services(self) -> str:
        return f"10.{10 + self.number}.0.0/16"

    def service(self, last: int) -> str:
        return f"10.{10 + self.number}.0.{last}"

    @property
    def dns(self) -> str:
        return self.service(10)

    @property
    def links(self) -> tuple[str, str]:
        return f"gr{self.number}h", f"gr{self.number}n"

    def up(self) -> None:
        """Create the namespace, a link to it, and routes from the host to pods and Services."""
        self.down()
        outer, inner = self.links
        _ip("netns", "add", self.netns)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", self.netns)
        _ip("addr", "add", f"{self.host}/30", "dev", outer)
        _ip("link", "set", outer, "up")
        for command in (
            ("addr", "add", f"{self.node}/30", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", self.host),
        ):
            _ip("-n", self.netns, *command)
        # Policies apply to two pods on one bridge, too, so the bridge passes its packets to iptables.
        if not Path("/proc/sys/net/bridge").exists():
            output(["modprobe", "br_netfilter"])
        keys = ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.bridge.bridge-nf-call-iptables=1"]
        if IPV6:
            keys += ["net.ipv6.conf.all.forwarding=1", "net.bridge.bridge-nf-call-ip6tables=1"]
        for key in keys:
            self.run("sysctl", "-qw", key)
        for target in (self.services, self.pods):
            _ip("route", "add", target, "via", self.node)
        if IPV6:
            # nodad: the addresses can be used at once, and nobody else is on the link.
            _ip("addr", "add", f"{self.host_ipv6}/64", "dev", outer, "nodad")
            _ip("-n", self.netns, "addr", "add", f"{self.node_ipv6}/64", "dev", inner, "nodad")
            _ip("-n", self.netns, "route", "add", "default", "via", self.host_ipv6)
            for target in (self.services_ipv6, self.pods_ipv6):
                _ip("route", "add", target, "via", self.node_ipv6)

    def run(self, *command: str) -> str:
        """Run a short program in the namespace. Return its output."""
        return output(["nsenter", f"--net=/run/netns/{self.netns}", *command])

    def down(self) -> None:
        """Delete the link and the namespace. The routes are deleted with them."""
        output(["ip", "link", "del", self.links[0]], check=False)
        output(["ip", "netns", "del", self.netns], check=False)


def both(ipv4: str, ipv6: str) -> str:
    """Return an option of a program of Kubernetes that takes an address of each family."""
    return f"{ipv4},{ipv6}" if IPV6 else ipv4


def _ip(*arguments: str) -> None:
    output(["ip", *arguments])


@dataclass
class Node:
    """The daemons of the node. `images` holds containerd's content and snapshots, and is kept between runs."""

    plane: ControlPlane
    network: Network
    images: Path

    @property
    def state(self) -> Path:
        return self.plane.state / "node"

    @property
    def socket(self) -> Path:
        return self.state / "containerd.sock"

    @property
    def cgroup(self) -> str:
        return f"graft-{self.network.name}"

    def ctr(self, *arguments: str) -> list[str]:
        """Return a ctr command line for the images and containers of Kubernetes."""
        return ["ctr", "--address", str(self.socket), "-n", "k8s.io", *arguments]

    def start_containerd(self) -> None:
        """Start containerd with its own root, state, socket and CNI configuration."""
        self.state.mkdir(parents=True, exist_ok=True)
        self.images.mkdir(parents=True, exist_ok=True)
        cni = self.state / "cni"
        cni.mkdir(exist_ok=True)
        (cni / "10-graft.conflist").write_text(json.dumps(self._cni()))
        config = self.state / "containerd.toml"
        # restrict_oom_score_adj: without it, sandboxes cannot start on a machine without CAP_SYS_RESOURCE.
        config.write_text(
            f"""version = 2
root = "{self.images}"
state = "{self.state}/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
"""
        )
        self.plane.processes.start(
            "containerd", ["containerd", "--config", config, "--log-level", "warn"], netns=self.network.netns
        )
        wait_for(
            self._containerd_answers,
            30,
            "containerd answers",
            lambda: tail(self.plane.processes.logs / "containerd.log"),
        )

    def _containerd_answers(self) -> bool:
        self.plane.processes.require("containerd")
        return "Server" in output(self.ctr("version"), check=False)

    def _cni(self) -> dict[str, object]:
        bridge = {
            "type": "bridge",
            "bridge": "graft0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.state / "ipam"),
                "ranges": [[{"subnet": self.network.pods}], *([[{"subnet": self.network.pods_ipv6}]] if IPV6 else [])],
                "routes": [{"dst": "0.0.0.0/0"}, *([{"dst": "::/0"}] if IPV6 else [])],
            },
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.4.0", "name": f"graft-{self.network.name}", "plugins": [bridge, portmap]}

    def make_cgroups(self) -> None:
        """Create the kubelet's root in every cgroup hierarchy. A new cpuset is empty, so it gets the values of its parent."""
        for hierarchy in self._hierarchies():
            folder = hierarchy / self.cgroup
            folder.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (hierarchy / name).exists() and (folder / name).exists():
                    (folder / name).write_text((hierarchy / name).read_text())

    def _hierarchies(self) -> list[Path]:
        if (CGROUPS / "cgroup.controllers").exists():
            return [CGROUPS]
        return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink() and path.is_mount()]

    def remove_cgroups(self) -> None:
        """Remove the cgroups, the deepest first. They are empty once the pods have ended."""
        for hierarchy in self._hierarchies():
            root = hierarchy / self.cgroup
            if not root.exists():
                continue
            self._end_processes(root)
            folders = sorted((path for path in root.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
            for folder in [*folders, root]:
                wait_for(lambda folder=folder: _removed(folder), 10, f"cgroup {folder} is empty")  # type: ignore[misc]

    def _end_processes(self, root: Path) -> None:
        """Kill the processes that still run in a pod's cgroup, because containerd ended before them."""
        for members in root.rglob("cgroup.procs"):
            for pid in members.read_text().split():
                output(["kill", "-9", pid], check=False)

    def start(self) -> None:
        """Start kubelet, kube-proxy and CoreDNS. Wait until the node is Ready."""
        keys, name = self.plane.state / "pki", NODE
        pki.certificate(keys, "kubelet", f"/O=system:nodes/CN=system:node:{name}", (self.network.node, name))
        pki.kubeconfig(keys, "kubelet", self.plane.server, keys / "kubelet.kubeconfig")
        pki.certificate(keys, "proxy", "/CN=system:kube-proxy")
        pki.kubeconfig(keys, "proxy", self.plane.server, keys / "proxy.kubeconfig")
        self.make_cgroups()
        kubelet = self.state / "kubelet.json"
        kubelet.write_text(json.dumps(self._kubelet(keys)))
        processes = self.plane.processes
        processes.start(
            "kubelet",
            [
                binary("kubelet"), f"--config={kubelet}", f"--kubeconfig={keys}/kubelet.kubeconfig", f"--root-dir={self.state}/kubelet",
                f"--cert-dir={keys}", f"--hostname-override={name}", f"--node-ip={both(self.network.node, self.network.node_ipv6)}", "--v=1",
                "--node-labels=topology.kubernetes.io/region=local,topology.kubernetes.io/zone=local-a",
            ],
            netns=self.network.netns,
        )  # fmt: skip
        processes.start(
            "kube-proxy",
            [
                binary("kube-proxy"), f"--kubeconfig={keys}/proxy.kubeconfig", "--proxy-mode=iptables",
                f"--cluster-cidr={both(self.network.pods, self.network.pods_ipv6)}",
                "--masquerade-all", "--conntrack-max-per-core=0", f"--hostname-override={name}", "--healthz-bind-address=",
                "--metrics-bind-address=127.0.0.1:10249",
            ],
            netns=self.network.netns,
        )  # fmt: skip
        wait_for(self._ready, 60, "the node is Ready", lambda: tail(processes.logs / "kubelet.log"))
        self._start_dns()

    def _ready(self) -> bool:
        self.plane.processes.require("kubelet")
        path = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        return self.plane.kubectl("get", "nodes", "-o", path, check=False).strip() == "True"

    def _kubelet(self, keys: Path) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "clusterDNS": [self.network.dns],
            "clusterDomain": "cluster.local",
            "resolvConf": "/dev/null",
            "podLogsDir": f"{self.state}/pods",
            "authentication": {"x509": {"clientCAFile": f"{keys}/ca.crt"}, "anonymous": {"enabled": False}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{keys}/kubelet.crt",
            "tlsPrivateKeyFile": f"{keys}/kubelet.key",
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "serializeImagePulls": False,
            "registryPullQPS": 0,
            "maxPods": 60,
            "syncFrequency": "10s",  # instead of 1 min: Secrets that change reach the pods' files in this time
            "shutdownGracePeriod": "0s",
        }

    def _start_dns(self) -> None:
        """Start CoreDNS as a process at the node's address, behind the Service kube-dns."""
        corefile = self.state / "Corefile"
        corefile.write_text(
            f"""cluster.local:53 in-addr.arpa:53 {{
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {self.plane.kubeconfig}
    pods insecure
  }}
  cache 5
}}
"""
        )
        self.plane.processes.start("coredns", [binary("coredns"), "-conf", corefile], netns=self.network.netns)
        ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
        objects = {
            "apiVersion": "v1",
            "kind": "List",
            "items": [
                {
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
                    "spec": {"clusterIP": self.network.dns, "ports": ports},
                },
                {
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                    "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}},
                    "ports": ports, "endpoints": [{"addresses": [self.network.node], "conditions": {"ready": True}}],
                },
            ],
        }  # fmt: skip
        manifest = self.state / "dns.json"
        manifest.write_text(json.dumps(objects))
        self.plane.kubectl("apply", "-f", str(manifest))
        wait_for(self._resolves, 30, "CoreDNS answers", lambda: tail(self.plane.processes.logs / "coredns.log"))

    def _resolves(self) -> bool:
        """Return whether CoreDNS resolves kubernetes.default.svc. The query uses TCP, which fails if no server listens."""
        self.plane.processes.require("coredns")
        question = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + b"".join(
            bytes([len(part)]) + part for part in (b"kubernetes", b"default", b"svc", b"cluster", b"local", b"")
        )
        message = question + b"\x00\x01\x00\x01"
        try:
            with socket.create_connection((self.network.dns, 53), timeout=2) as connection:
                connection.sendall(len(message).to_bytes(2, "big") + message)
                answer = connection.recv(512)
        except OSError:
            return False
        return len(answer) > 9 and int.from_bytes(answer[8:10], "big") > 0


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
