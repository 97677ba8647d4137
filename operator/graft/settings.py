"""What the chart tells the operator: /etc/graft-operator/config.json."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

CONFIG_FILE = "/etc/graft-operator/config.json"


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class Images(_Part):
    """The images of the pods that the operator makes."""

    trainer: str
    engine: str
    agent: str
    vllm: str = ""


class Storage(_Part):
    """How namespaces come to their key of the object store."""

    issue_credentials: bool = (
        True  # through the store's identity service; else the platform team puts graft-storage there
    )
    create_bucket: bool = False
    endpoint: str = ""  # what pods are told; the operator's own when empty
    admin_url: str = ""  # the identity service; the endpoint when empty


class Signing(_Part):
    """The Secret of the operator's namespace with the keys that sign verified versions."""

    secret: str = "graft-signing"  # noqa: S105 - a name
    create: bool = True  # where it is not there; else the platform team puts it there


class Spot(_Part):
    """How nodes that may be taken away are known: pods of jobs with spec.spot prefer their labels and tolerate their taints."""

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


class Settings(_Part):
    """The operator's configuration."""

    namespace: str
    images: Images
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = Field(default_factory=list)
    storage: Storage = Field(default_factory=Storage)
    signing: Signing = Field(default_factory=Signing)
    spot: Spot = Field(default_factory=Spot)
    gateway_url: str = ""
    gateway_selector: dict[str, str] = Field(default_factory=lambda: {"app.kubernetes.io/component": "gateway"})
    huggingface_endpoint: str | None = None
    operator_service_account: str = "graft-operator"
    tenant_cluster_role: str = "graft-tenant"


def load(path: str | None = None) -> Settings:
    """Read the file (GRAFT_CONFIG names another one). pydantic's ValidationError says which field is wrong."""
    return Settings.model_validate_json(Path(path or os.environ.get("GRAFT_CONFIG", CONFIG_FILE)).read_text())
