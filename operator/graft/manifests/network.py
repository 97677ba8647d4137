"""Build the NetworkPolicies of serving and training pods: default deny both ways, and the flows that these pods need."""

import ipaddress
import re
from urllib.parse import urlsplit

from graft.api import AdapterDeployment, FineTuneJob
from graft.contracts.mounts import AGENT_PORT, ENGINE_PORT
from graft.manifests.metadata import OWNER_UID, Manifest, child
from graft.settings import Settings

# Addresses at which clouds give out credentials of the node or control it, and all link-local addresses. No policy that
# allows "all addresses" includes them. `python -m graft.crdgen` writes CLOSED into the chart, so this is the only list.
_CLOSED_IPV4 = (
    "169.254.0.0/16",  # link-local: the metadata of most clouds, AWS's credentials of tasks (170.2) and pods (170.23)
    "168.63.129.16/32",  # Azure's WireServer
    "100.100.100.200/32",  # Alibaba Cloud
    "192.0.0.192/32",  # Oracle Cloud Classic
)
_CLOSED_IPV6 = (
    "fe80::/10",  # link-local
    "fd00:ec2::/32",  # AWS: metadata (::254), credentials of pods (::23)
    "fd20:ce::254/128",  # Google Cloud
    "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud
    "fd00:42::42/128",  # Scaleway
    "fd00:a9fe:a9fe::1/128",  # Akamai (Linode)
)


def _behind_nat64(cidr: str) -> str:
    """Return the IPv6 range by which NAT64 (RFC 6052, prefix 64:ff9b::/96) reaches an IPv4 range."""
    network = ipaddress.IPv4Network(cidr)
    address = int(ipaddress.IPv6Address("64:ff9b::")) | int(network.network_address)
    return f"{ipaddress.IPv6Address(address)}/{96 + network.prefixlen}"


# all addresses -> the ranges in them that stay closed
CLOSED: dict[str, list[str]] = {
    "0.0.0.0/0": list(_CLOSED_IPV4),
    "::/0": [*_CLOSED_IPV6, *(_behind_nat64(cidr) for cidr in _CLOSED_IPV4)],
}
WORLD: list[Manifest] = [{"ipBlock": {"cidr": cidr, "except": closed}} for cidr, closed in CLOSED.items()]
ALL_PODS: Manifest = {"namespaceSelector": {}}
NAMESPACE = "kubernetes.io/metadata.name"  # label of a namespace, with its name
DNS_PORTS = (53, 5353)  # 5353 is the port of OpenShift's DNS pods
HTTPS = 443
SERVICE_HOST = re.compile(r"[^.]+\.(?P<namespace>[^.]+)(?P<svc>\.svc(\..+)?)?")


def serving_policy(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    """Return the policy of serving pods.

    Only the gateway reaches the engine's port, which also asks each caller for its key. The agent's port has metrics and
    probes. Probes come from the node, which no policy stops, so only scrapers need a rule.
    """
    gateway = {
        "namespaceSelector": {"matchLabels": {NAMESPACE: settings.namespace}},
        "podSelector": {"matchLabels": settings.gateway_selector},
    }
    # A peer without a namespace means a pod of the chart's namespace, as in the chart's own policies.
    chart = {"namespaceSelector": {"matchLabels": {NAMESPACE: settings.namespace}}}
    scrapers = [chart | peer if "podSelector" in peer else peer for peer in settings.network.metrics_from]
    # An empty `from` would admit everybody.
    scrapes = [{"from": scrapers, "ports": _tcp(AGENT_PORT)}] if scrapers else []
    return child(
        "networking.k8s.io/v1", "NetworkPolicy", f"{deployment.metadata.name}-serving", deployment, "network"
    ) | {
        "spec": {
            "podSelector": {"matchLabels": {OWNER_UID: deployment.metadata.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [gateway], "ports": _tcp(ENGINE_PORT)}, *scrapes],
            "egress": egress(settings, api_server=True),
        }
    }


def training_policy(job: FineTuneJob, settings: Settings) -> Manifest:
    """Return the policy of training pods. The pods of one run reach each other at every port."""
    own = {"matchLabels": {OWNER_UID: job.metadata.uid}}
    return child("networking.k8s.io/v1", "NetworkPolicy", f"{job.metadata.name}-training", job, "network") | {
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": own}]}],
            "egress": [*egress(settings), {"to": [{"podSelector": own}]}],
        }
    }


def egress(settings: Settings, *, api_server: bool = False) -> list[Manifest]:
    """Return the egress rules of a pod: DNS, the object store, the hub, and the flows that the platform team added.

    The addresses of the store, the hub and the API server are not known, so their ports limit the rules.
    """
    ports: set[int] = {HTTPS}
    services: list[Manifest] = []
    urls = (settings.storage.endpoint, settings.storage.sts_endpoint, settings.huggingface_endpoint)
    for url in filter(None, (*urls, *settings.network.proxies)):
        port, namespace, inside = _target(url)
        if not inside:
            ports.add(port)
        if namespace is not None:
            rule: Manifest = {"to": [{"namespaceSelector": {"matchLabels": {NAMESPACE: namespace}}}]}
            # The pods of a Service may listen on another port than the Service. Those of the embedded store do not.
            services.append(rule | ({"ports": _tcp(port)} if namespace == settings.namespace else {}))
    if api_server:
        ports |= set(settings.network.api_server_ports)
    world = _world(settings)
    servers = [{"ipBlock": {"cidr": cidr}} for cidr in settings.network.dns_servers]
    udp = [{"protocol": "UDP", "port": port} for port in DNS_PORTS]
    return [
        {"to": [ALL_PODS, *world, *servers], "ports": [*udp, *_tcp(*DNS_PORTS)]},
        {"to": world, "ports": _tcp(*sorted(ports))},
        *services,
        *settings.network.egress,
    ]


def _world(settings: Settings) -> list[Manifest]:
    """Return WORLD without the addresses that the platform team closed."""
    more = {cidr: [item for item in settings.network.closed if (":" in item) == (":" in cidr)] for cidr in CLOSED}
    return [{"ipBlock": {"cidr": cidr, "except": [*closed, *more[cidr]]}} for cidr, closed in CLOSED.items()]


def _tcp(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _target(url: str) -> tuple[int, str | None, bool]:
    """Return (port, namespace, inside) of a URL.

    `namespace` is the second part of the host if the host may be a Service's name. `inside`: the host is a Service's
    name for certain.
    """
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else HTTPS)
    found = SERVICE_HOST.fullmatch(parts.hostname or "")
    if found is None:
        return port, None, False
    return port, found["namespace"], found["svc"] is not None
