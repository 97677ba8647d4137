"""What all kinds share: the schema base class, conditions and the names of the API group.

The pydantic models of this package are the only schema: `graft.crdgen` turns them into the CustomResourceDefinitions,
the operator parses live objects with them, and docs/reference.md is generated from their descriptions.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "graft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
GPU = "nvidia.com/gpu"  # the device plugin's name of the resource, and the usual taint's


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for `json_schema_extra`: (expression, message) pairs, checked by the API server at apply time."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


class Schema(PydanticModel):
    """Base of every API model: camelCase on the wire, snake_case in Python, unknown fields refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    def wire(self) -> dict[str, Any]:
        """The object as it goes over the wire: camelCase keys, absent values left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Status(Schema):
    """Base of the status models: what an older or newer operator wrote must not stop this one from reading."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


class Condition(Status):
    """One observation about a resource, in the shape of metav1.Condition."""

    type: str = Field(max_length=316, description="What is observed, for example Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    observed_generation: int | None = Field(
        default=None, description="The generation of the spec that this was observed for."
    )
    last_transition_time: str = Field(
        description="When the status last changed.", json_schema_extra={"format": "date-time"}
    )
    reason: str = Field(max_length=1024, description="Why, in one word from the documented list.")
    message: str = Field(max_length=32768, description="What happened and what to do about it.")


class ObjectMeta(PydanticModel):
    """The part of metadata that the operator reads."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    finalizers: list[str] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Resource(PydanticModel):
    """Base of the four kinds: metadata beside a typed spec and status."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    metadata: ObjectMeta


Conditions = Annotated[
    list[Condition],
    Field(
        default_factory=list,
        description="Observations about the resource; see the reasons in docs/reference.md.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]

QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)

Quantities = Annotated[
    dict[str, str | int],
    Field(
        description="Amounts by resource name, as in a container: cpu, memory, ephemeral-storage, nvidia.com/gpu.",
        json_schema_extra={
            "additionalProperties": {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "pattern": QUANTITY,
            }
        },
    ),
]


class Resources(Schema):
    """What a container asks of its node, as in a pod."""

    requests: Quantities | None = Field(default=None, description="What the scheduler sets aside.")
    limits: Quantities | None = Field(default=None, description="What the container may not exceed.")

    def gpus(self) -> int:
        """The number of GPUs asked for (limits, as the device plugin wants it)."""
        return int((self.limits or {}).get(GPU, 0))


class Toleration(Schema):
    """A taint that the pods tolerate, as in a pod."""

    key: str | None = Field(default=None, description="The taint's key; empty matches all keys with Exists.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="How value is compared.")
    value: str | None = Field(default=None, description="The taint's value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect; empty matches all."
    )
    toleration_seconds: int | None = Field(default=None, description="For NoExecute: how long it is tolerated.")


# The usual taint of GPU nodes. The API server's ExtendedResourceToleration gives pods that ask for GPUs this toleration; so do we,
# where it is not on.
GPU_TOLERATION = Toleration(key=GPU, operator="Exists", effect="NoSchedule")


class Placement(Schema):
    """Where the pods may run."""

    node_selector: dict[str, str] | None = Field(default=None, description="Labels that the node must carry.")
    tolerations: list[Toleration] | None = Field(
        default=None,
        description="Taints that the pods tolerate.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    priority_class_name: str | None = Field(default=None, description="The pods' PriorityClass.")
    runtime_class_name: str | None = Field(default=None, description="The pods' RuntimeClass, for example nvidia.")


MODEL_URI = r"^(hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/[^\s]*)?)$"
DATASET_URI = r"^(hf://datasets/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?/[^\s]+|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[^\s]+|configMap://[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9._-]+)$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SEMVER = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$"
# What the part behind the @ of an AdapterDeployment's entry may be, but for latest.
VERSION_RANGE = r"^\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2}$"
SHA256 = r"^sha256:[0-9a-f]{64}$"
