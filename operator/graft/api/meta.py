"""What all kinds share: the base class of the schema, conditions, and the names of the API group.

The pydantic models of this package are the only schema. `graft.crdgen` generates the CustomResourceDefinitions and
docs/reference.md from them. The operator parses live objects with them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "graft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
GPU = "nvidia.com/gpu"  # resource name of the device plugin, and key of the usual taint


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Return CEL rules for `json_schema_extra` from (expression, message) pairs. The API server checks them at apply
    time."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


class Schema(PydanticModel):
    """Base of every API model: camelCase in JSON, snake_case in Python. Unknown fields are refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    def wire(self) -> dict[str, Any]:
        """Return the object as JSON data: camelCase keys, without absent values."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Status(Schema):
    """Base of the status models. It ignores unknown fields, so it can read what an older or newer operator wrote."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


class Condition(Status):
    """One observation about a resource, in the form of metav1.Condition."""

    type: str = Field(max_length=316, description="Name of the condition, for example Ready.")
    status: Literal["True", "False", "Unknown"] = Field(
        description="True if the condition holds, False if it does not, Unknown if this is not known yet."
    )
    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the condition describes."
    )
    last_transition_time: str = Field(
        description="When the status of the condition last changed.", json_schema_extra={"format": "date-time"}
    )
    reason: str = Field(
        max_length=1024, description="Cause of the status, in one word. docs/reference.md lists all reasons."
    )
    message: str = Field(max_length=32768, description="What happened, and what to do about it.")


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
    """Base of the four kinds: metadata, next to a typed spec and status."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    metadata: ObjectMeta


Conditions = Annotated[
    list[Condition],
    Field(
        default_factory=list,
        description="Conditions of the resource. docs/reference.md lists their reasons.",
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
    """Resource requests and limits of a container, with the same fields as in a pod."""

    requests: Quantities | None = Field(default=None, description="Amounts that the scheduler reserves on the node.")
    limits: Quantities | None = Field(
        default=None,
        description="Amounts that the container must not exceed. GPUs are requested here, as nvidia.com/gpu.",
    )

    def gpus(self) -> int:
        """Return the number of GPUs in limits, where the device plugin expects it."""
        return int((self.limits or {}).get(GPU, 0))


class Toleration(Schema):
    """A taint that the pods tolerate, with the same fields as in a pod."""

    key: str | None = Field(
        default=None, description="Key of the taint. If it is empty and operator is Exists, every key matches."
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None,
        description="Exists: any value of the taint matches. Equal: the taint must have the same value. Equal when absent.",
    )
    value: str | None = Field(default=None, description="Value of the taint, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. If it is empty, every effect matches."
    )
    toleration_seconds: int | None = Field(
        default=None,
        description="For effect NoExecute: seconds that a pod may stay on a node with the taint. No limit when absent.",
    )


# The usual taint of GPU nodes. The admission plugin ExtendedResourceToleration adds this toleration to pods that
# request GPUs. The plugin may be disabled, so Graft adds the toleration too.
GPU_TOLERATION = Toleration(key=GPU, operator="Exists", effect="NoSchedule")


class Placement(Schema):
    """Which nodes the pods may run on."""

    node_selector: dict[str, str] | None = Field(
        default=None, description="Labels that a node must have to run the pods."
    )
    tolerations: list[Toleration] | None = Field(
        default=None,
        description="Taints of nodes that the pods tolerate.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    priority_class_name: str | None = Field(
        default=None, description="Name of the pods' PriorityClass. The cluster's default when absent."
    )
    runtime_class_name: str | None = Field(
        default=None,
        description="Name of the pods' RuntimeClass, for example nvidia. The node's default runtime when absent.",
    )


MODEL_URI = r"^(hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/[^\s]*)?)$"
DATASET_URI = r"^(hf://datasets/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?/[^\s]+|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[^\s]+|configMap://[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9._-]+)$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SEMVER = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$"
# The part after the @ in an entry of AdapterDeployment.spec.adapters, except `latest`.
VERSION_RANGE = r"^\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2}$"
SHA256 = r"^sha256:[0-9a-f]{64}$"
