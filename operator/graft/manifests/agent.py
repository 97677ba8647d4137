"""Build what the agents of an AdapterDeployment need: identity, rights, and two ConfigMaps to communicate with the
operator."""

from graft.api import AdapterDeployment
from graft.contracts.agent import WANTED_KEY, Wanted
from graft.manifests.metadata import Manifest, child
from graft.manifests.serving import agent_account, residency_name, wanted_name
from graft.settings import Settings


def service_account(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    """Return the service account of the agents. Its annotations are the platform's: a spec cannot ask for a role."""
    account = child("v1", "ServiceAccount", agent_account(deployment), deployment, "agent")
    if settings.serving_account_annotations:
        account["metadata"]["annotations"] = settings.serving_account_annotations
    return account | {"automountServiceAccountToken": False}


def role(deployment: AdapterDeployment) -> Manifest:
    """Return the Role: access to the two ConfigMaps only. `list` and `watch` are limited by resourceNames too."""
    rule = {"apiGroups": [""], "resources": ["configmaps"]}
    return child("rbac.authorization.k8s.io/v1", "Role", agent_account(deployment), deployment, "agent") | {
        "rules": [
            rule | {"resourceNames": [wanted_name(deployment)], "verbs": ["get", "list", "watch"]},
            rule | {"resourceNames": [residency_name(deployment)], "verbs": ["get", "patch"]},
        ]
    }


def role_binding(deployment: AdapterDeployment) -> Manifest:
    name = agent_account(deployment)
    return child("rbac.authorization.k8s.io/v1", "RoleBinding", name, deployment, "agent") | {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": deployment.metadata.namespace}],
    }


def wanted_config_map(deployment: AdapterDeployment, wanted: Wanted) -> Manifest:
    """Return the ConfigMap with the adapters that the replicas should load."""
    return wanted_identity(deployment) | {"data": {WANTED_KEY: wanted.json_text()}}


def wanted_identity(deployment: AdapterDeployment) -> Manifest:
    """Return the ConfigMap with the wanted adapters, without its data."""
    return child("v1", "ConfigMap", wanted_name(deployment), deployment, "wanted")


def residency_config_map(deployment: AdapterDeployment) -> Manifest:
    """Return an empty ConfigMap. Each agent applies its own key with its own field manager."""
    return child("v1", "ConfigMap", residency_name(deployment), deployment, "residency")
