"""Tenant: a team, its namespaces, and its people. It is a cluster-wide resource, which the platform team writes."""

from typing import Literal

from pydantic import Field

from graft.api.limits import ServingLimits
from graft.api.meta import Conditions, Resource, Schema, Status, rules
from graft.api.patterns import DNS_LABEL, DNS_NAME, SUBJECT
from graft.api.podtemplate import LabelSelector

MOST_NAMES = 500  # namespaces that spec.namespaces.names lists


class Namespaces(Schema):
    """Which namespaces belong to the tenant: those with one of the names, and those that the selector matches."""

    names: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_NAMES,
        description="Names of namespaces. A namespace that does not exist yet belongs to the tenant when it is created.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": DNS_LABEL, "maxLength": 63},
        },
    )
    selector: LabelSelector | None = Field(
        default=None,
        description="Labels of namespaces. Whoever may create namespaces or change their labels then decides what belongs to "
        "the tenant. The namespaces of Kubernetes and the operator's own never match.",
    )

    inherit: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_NAMES,
        description="Names of namespaces of the tenant that take over the files that an earlier namespace of the same name has left "
        "in the bucket. All others get a storage key only if there are no such files.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": DNS_LABEL, "maxLength": 63},
        },
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.names) || has(self.selector)", "namespaces: give names, a selector, or both"),
            (
                "!has(self.selector) || (has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0) || "
                "(has(self.selector.matchExpressions) && self.selector.matchExpressions.size() > 0)",
                "namespaces.selector: an empty selector would match every namespace. Name at least one label",
            ),
        )
    }


class Member(Schema):
    """A group or a user of the tenant."""

    kind: Literal["Group", "User"] = Field(description="Whether name is a group's or a user's.")
    name: str = Field(
        pattern=SUBJECT,
        max_length=253,
        description="Name of the group or user, as the cluster's authentication gives it. A service account is the User "
        "system:serviceaccount:<namespace>:<name>.",
    )
    role: Literal["view", "edit", "admin"] = Field(
        description="What the member may do in every namespace of the tenant. view: read Graft's resources. edit: also create, "
        "change and delete jobs, versions and deployments. admin: also read the namespace's storage key and API keys, and its pods, "
        "their logs and Events."
    )

    # All other names that begin with system: are those of Kubernetes itself, or of people whom nobody has chosen.
    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "!self.name.startsWith('system:') || "
                "(self.kind == 'User' && self.name.matches('^system:serviceaccount:[a-z0-9-]+:[a-z0-9.-]+$')) || "
                "(self.kind == 'Group' && self.name.matches('^system:serviceaccounts:[a-z0-9-]+$'))",
                "members: a name that begins with system: must be a service account (User "
                "system:serviceaccount:<namespace>:<name>) or all those of a namespace (Group "
                "system:serviceaccounts:<namespace>)",
            ),
        )
    }


class Quotas(Schema):
    """How much the training jobs of the tenant may take at the same time, in all its namespaces together."""

    training_jobs: int | None = Field(
        default=None,
        ge=0,
        le=100_000,
        description="Number of FineTuneJobs that have begun and not ended. Further jobs wait. A suspended job keeps its place. "
        "Jobs with spec.queue are left to Kueue, and do not count. Any number when absent.",
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Number of GPUs (nvidia.com/gpu) of these jobs. A job with more never starts. Any number when absent.",
    )


class TenantSpec(Schema):
    """Which namespaces are the tenant's, who may do what in them, and what they may use."""

    namespaces: Namespaces = Field(description="Namespaces of the tenant.")
    members: list[Member] | None = Field(
        default=None,
        max_length=100,
        description="Groups and users, with their role in the namespaces of the tenant. The operator keeps RoleBindings for them.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["kind", "name"]},
    )

    base_models: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Names of the BaseModels that jobs and deployments of the tenant may use. spec.allowedNamespaces of a "
        "BaseModel must allow the namespace, too. All BaseModels when absent.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": DNS_NAME, "maxLength": 63},
        },
    )
    quotas: Quotas | None = Field(default=None, description="Limits of the training jobs. None when absent.")
    limits: ServingLimits | None = Field(
        default=None,
        description="What all clients with API keys of the tenant's namespaces may use together. The limits of a key hold, too. There "
        "are none when absent.",
    )


class TenantStatus(Status):
    """What the tenant has."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(default=None, description="Summary of the conditions: Ready, Waiting or Incomplete.")
    namespaces: list[str] | None = Field(
        default=None,
        description="Namespaces that exist and belong to the tenant.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    conditions: Conditions


class Tenant(Resource):
    """A team that shares the cluster with others: its namespaces, and its people."""

    spec: TenantSpec
    status: TenantStatus = Field(default_factory=lambda: TenantStatus(conditions=[]))


CRD = {
    "kind": "Tenant",
    "plural": "tenants",
    "shortNames": ["gt"],
    "scope": "Cluster",
    # Not in the category graft: whoever may read everything else would get an error from `kubectl get graft`.
    "categories": [],
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Namespaces", "string", ".status.namespaces", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Message", "string", ".status.conditions[?(@.type=='Ready')].message", 1),
    ],
    "rules": rules(
        (
            "self.metadata.name.size() <= 63",
            "metadata.name must be at most 63 characters, because it becomes a label value",
        ),
        (
            "!self.metadata.name.contains('.')",
            "metadata.name must have no dots: name the Tenant as a namespace is named",
        ),
    ),
}
