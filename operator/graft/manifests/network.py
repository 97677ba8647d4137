"""Build the NetworkPolicies: only the gateway reaches an engine's port, and only pods of the same run reach a training
pod."""

from graft.api import AdapterDeployment, FineTuneJob
from graft.contracts.mounts import AGENT_PORT, ENGINE_PORT
from graft.manifests.metadata import OWNER_UID, Manifest, child
from graft.settings import Settings

# All addresses except the cloud's metadata address, which would give out the node's own credentials.
EGRESS: list[Manifest] = [
    {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}}, {"namespaceSelector": {}}]},
    {"to": [{"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::254/128"]}}]},
]


def serving_policy(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    """Return the policy of serving pods.

    The engine's admin routes load and unload adapters, so only the gateway reaches its port.
    """
    gateway = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.namespace}},
        "podSelector": {"matchLabels": settings.gateway_selector},
    }
    return child(
        "networking.k8s.io/v1", "NetworkPolicy", f"{deployment.metadata.name}-serving", deployment, "network"
    ) | {
        "spec": {
            "podSelector": {"matchLabels": {OWNER_UID: deployment.metadata.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [gateway], "ports": [{"protocol": "TCP", "port": ENGINE_PORT}]},
                {"ports": [{"protocol": "TCP", "port": AGENT_PORT}]},  # metrics and probes; these routes change nothing
            ],
            "egress": EGRESS,
        }
    }


def training_policy(job: FineTuneJob) -> Manifest:
    """Return the policy of training pods: ingress only from pods of the same run, egress to all but the cloud's
    metadata address."""
    own = {"matchLabels": {OWNER_UID: job.metadata.uid}}
    return child("networking.k8s.io/v1", "NetworkPolicy", f"{job.metadata.name}-training", job, "network") | {
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": own}]}],
            "egress": EGRESS,
        }
    }
