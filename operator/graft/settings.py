"""The operator's configuration, which the chart writes to /etc/graft-operator/config.json."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from graft.api.meta import GPU

CONFIG_FILE = "/etc/graft-operator/config.json"


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True, frozen=True
    )


class Images(_Part):
    """The images of the pods that the operator creates."""

    trainer: str
    engine: str
    agent: str
    vllm: str = ""


class Storage(_Part):
    """How namespaces get their key of the object store."""

    # True: the operator creates keys through the store's identity service. False: the platform team creates the Secret
    # graft-storage in each namespace.
    issue_credentials: bool = True
    create_bucket: bool = False
    endpoint: str = ""  # the endpoint for pods; if empty, the operator's own
    admin_url: str = ""  # the identity service; if empty, the store's endpoint
    # The audience of the tokens with which pods assume the role in their Secret. If empty, Secrets have keys.
    web_identity_audience: str = ""
    sts_endpoint: str = ""  # for the NetworkPolicies; if empty, AWS's


class Signing(_Part):
    """The Secret in the operator's namespace with the keys that sign verified versions."""

    secret: str = "graft-signing"  # noqa: S105 - a name
    create: bool = True  # True: the operator creates the Secret if it does not exist; False: the platform team does


class Network(_Part):
    """What the NetworkPolicies of serving and training pods allow besides the flows that Graft knows."""

    api_server_ports: list[int] = Field(default_factory=lambda: [443, 6443])
    # Link-local addresses of DNS servers that are not pods. The default is NodeLocal DNSCache's.
    dns_servers: list[str] = Field(default_factory=lambda: ["169.254.20.10/32"])
    egress: list[dict[str, Any]] = Field(default_factory=list)  # NetworkPolicyEgressRules
    metrics_from: list[dict[str, Any]] = Field(default_factory=list)  # NetworkPolicyPeers; if empty, no pod
    proxies: list[str] = Field(default_factory=list)  # URLs of the proxies that pods send their requests to
    closed: list[str] = Field(default_factory=list)  # CIDRs that are closed besides the clouds' metadata addresses


class Spot(_Part):
    """How spot nodes are recognised. Pods of jobs with spec.spot prefer nodes with these labels and tolerate these
    taints."""

    labels: dict[str, str] = Field(
        default_factory=lambda: {
            "karpenter.sh/capacity-type": "spot",
            "eks.amazonaws.com/capacityType": "SPOT",
            "cloud.google.com/gke-spot": "true",
            "kubernetes.azure.com/scalesetpriority": "spot",
        }
    )
    taints: list[str] = Field(
        default_factory=lambda: ["cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"]
    )


class AllowedTaint(_Part):
    """A taint that tenants' pods may tolerate. An absent value or effect allows every value or effect."""

    key: str  # EVERY allows every taint
    value: str | None = None
    effect: str | None = None


class PlatformTemplate(_Part):
    """What the platform team adds to all training or serving pods: the fields of graft.api.podtemplate, as in a pod.

    The platform team may set every variable and mount every volume that Pod Security allows.
    """

    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    affinity: dict[str, Any] = Field(default_factory=dict)
    topology_spread_constraints: list[dict[str, Any]] = Field(default_factory=list)
    env: list[dict[str, Any]] = Field(default_factory=list)
    volumes: list[dict[str, Any]] = Field(default_factory=list)
    volume_mounts: list[dict[str, Any]] = Field(default_factory=list)

    @cached_property
    def _wire(self) -> dict[str, Any]:
        found = {key: value for key, value in self.model_dump(by_alias=True).items() if value}
        # A volume of the platform never has the name of a volume of Graft.
        for field in ("volumes", "volumeMounts"):
            if field in found:
                found[field] = [item | {"name": f"platform-{item['name']}"} for item in found[field]]
        return found

    def wire(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON data. The caller must not change it."""
        return self._wire


EVERY = "*"  # in the lists of Allowed: every name


class Allowed(_Part):
    """What the specs in tenants' namespaces may ask the scheduler and the node for. Everything else is refused."""

    # EVERY allows all names except those that begin with system-. Kubernetes reserves these for its own components.
    priority_classes: list[str] = Field(default_factory=list)
    runtime_classes: list[str] = Field(default_factory=lambda: ["nvidia"])
    tolerations: list[AllowedTaint] = Field(default_factory=lambda: [AllowedTaint(key=GPU)])
    # Keys in spec.podTemplate. <domain>/* allows all keys of a domain. EVERY allows every label, and every annotation
    # that is not of the domains kubernetes.io, k8s.io and x-k8s.io.
    pod_labels: list[str] = Field(default_factory=lambda: [EVERY])
    pod_annotations: list[str] = Field(default_factory=list)


class Settings(_Part):
    """The operator's configuration."""

    namespace: str
    images: Images
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = Field(default_factory=list)
    storage: Storage = Field(default_factory=Storage)
    signing: Signing = Field(default_factory=Signing)
    spot: Spot = Field(default_factory=Spot)
    network: Network = Field(default_factory=Network)
    allowed: Allowed = Field(default_factory=Allowed)
    training_pods: PlatformTemplate = Field(default_factory=PlatformTemplate)
    serving_pods: PlatformTemplate = Field(default_factory=PlatformTemplate)
    serving_account_annotations: dict[str, str] = Field(default_factory=dict)  # of the agents' service accounts
    run_as_user: int | None = 65532  # None: the cluster chooses the user, as OpenShift does
    ipv6: bool = False  # whether pods have IPv6 addresses; the operator sees it from its own
    vllm_int4: bool = False  # whether the image of vLLM can load 4-bit weights (bitsandbytes)
    prometheus_url: str = ""  # KEDA reads the gateway's metrics from this Prometheus; if empty, KEDA cannot
    engine_tls: bool = False  # whether engines listen with TLS
    gateway_url: str = ""
    gateway_selector: dict[str, str] = Field(default_factory=lambda: {"app.kubernetes.io/component": "gateway"})
    huggingface_endpoint: str | None = None
    operator_service_account: str = "graft-operator"
    tenant_cluster_role: str = "graft-tenant"
    tenants_enabled: bool = False  # whether the operator has the rights that Tenants need
    # role of a member of a Tenant -> the ClusterRole that has its rights
    member_cluster_roles: dict[str, str] = Field(
        default_factory=lambda: {"view": "graft-view", "edit": "graft-edit", "admin": "graft-admin"}
    )


def load(path: str | None = None) -> Settings:
    """Read the configuration from `path`, from the file that GRAFT_CONFIG names, or from CONFIG_FILE. Raises pydantic's
    ValidationError, which names the wrong field."""
    return Settings.model_validate_json(Path(path or os.environ.get("GRAFT_CONFIG", CONFIG_FILE)).read_text())
