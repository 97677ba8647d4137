"""The policy engine of the node: the process kube-network-policies, and the rules that send it the first packet of every
connection from and to a pod.

If the process ends, the kernel drops these packets (the rules have no `--queue-bypass`), so that a dead engine opens no
flow. The rules are in the node's network namespace, so they never meet other traffic of the machine, and they are
deleted with the namespace. The engine has rules of its own for nftables. They need a kernel with NFT_QUEUE: without it, the
engine logs an error each second, and these rules alone send it packets.
"""

import json

from testbed import pki
from testbed.binaries import binary
from testbed.controlplane import ControlPlane
from testbed.node import IPV6, Network
from testbed.shell import tail, wait_for

ENGINE = "kube-network-policies"
QUEUE = "100"
RIGHTS = [
    {"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "watch"]},
]


def enforce(plane: ControlPlane, network: Network, node: str) -> None:
    """Start the policy engine. Wait until it has read all policies and receives packets."""
    keys = plane.state / "pki"
    pki.certificate(keys, ENGINE, f"/CN={ENGINE}")
    pki.kubeconfig(keys, ENGINE, plane.server, keys / f"{ENGINE}.kubeconfig")
    _grant(plane)
    ranges = {"iptables": network.pods} | ({"ip6tables": network.pods_ipv6} if IPV6 else {})
    for program, pods in ranges.items():
        for rule in _rules(pods, ipv6=program == "ip6tables"):
            network.run(program, "-w", "-t", "mangle", "-A", *rule)
    plane.processes.start(
        ENGINE,
        [
            binary(ENGINE), f"--kubeconfig={keys}/{ENGINE}.kubeconfig", f"--hostname-override={node}", f"--nfqueue-id={QUEUE}",
            "--fail-open=false", "--strict-mode=false", "--disable-nri", "--netfilter-bug-1766-fix=false",
            "--metrics-bind-address=127.0.0.1:9080",
        ],
        netns=network.netns,
    )  # fmt: skip
    wait_for(
        lambda: _receives(plane, network),
        60, "the policy engine receives packets", lambda: tail(plane.processes.logs / f"{ENGINE}.log"),
    )  # fmt: skip


def _rules(pods: str, *, ipv6: bool) -> list[list[str]]:
    """Return the rules of the table mangle. Its chains come after the translation of Services to pods, and before the
    source address is replaced."""
    queue = ["-m", "conntrack", "--ctstate", "NEW", "-j", "NFQUEUE", "--queue-num", QUEUE]
    return [
        *([["POSTROUTING", "-p", "icmpv6", "-j", "RETURN"]] if ipv6 else []),  # neighbour discovery
        # The kubelet's probes, and the node's daemons. Processes of pods are not meant: they are in other namespaces.
        ["POSTROUTING", "-m", "owner", "--uid-owner", "0", "-j", "RETURN"],
        ["POSTROUTING", "-s", pods, *queue],
        ["POSTROUTING", "-d", pods, *queue],
        # From a pod to the node itself: the API server, DNS.
        *([["INPUT", "-p", "icmpv6", "-j", "RETURN"]] if ipv6 else []),
        ["INPUT", "-s", pods, *queue],
    ]


def _receives(plane: ControlPlane, network: Network) -> bool:
    """Return whether the engine has opened its queue, which it does after it has read all pods and policies."""
    plane.processes.require(ENGINE)
    queues = network.run("cat", "/proc/net/netfilter/nfnetlink_queue")
    return any(line.split()[0] == QUEUE for line in queues.splitlines())


def _grant(plane: ControlPlane) -> None:
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": ENGINE}}
    group = "rbac.authorization.k8s.io"
    binding = {
        "apiVersion": f"{group}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": ENGINE},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": ENGINE},
        "subjects": [{"apiGroup": group, "kind": "User", "name": ENGINE}],
    }  # fmt: skip
    manifest = plane.state / f"{ENGINE}.json"
    manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [role | {"rules": RIGHTS}, binding]}))
    plane.kubectl("apply", "-f", str(manifest))
