"""What all kinds share: the base class of the schema, conditions, and the names of the API group.

The pydantic models of this package are the only schema. `graft.crdgen` generates the CustomResourceDefinitions and
docs/reference.md from them. The operator parses live objects with them.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic import BaseModel as PydanticModel
from pydantic.alias_generators import to_camel

from graft.api.quantity import quantity

GROUP = "graft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
GPU = "nvidia.com/gpu"  # resource name of the device plugin, and key of the usual taint


# Patterns of names. A name becomes part of a path, a label or a file's name, so no other characters are allowed.
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"  # at most 63 characters
DNS_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"  # at most 253 characters
# At most 253 characters, so that the part before the / is short enough, too.
LABEL_KEY = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"  # at most 63 characters
UID = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
SEMVER = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$"
# The part after the @ in an entry of AdapterDeployment.spec.adapters, except `latest`.
VERSION_RANGE = r"^\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2}$"
SHA256 = r"^sha256:[0-9a-f]{64}$"
SHA256_LENGTH = 71  # characters
KEY_NAME = r"^[^\x00-\x1f\x7f]+$"  # a key in a file of the user: any text without control characters

# Patterns of URIs. No part of a path may be .., which would lead out of the folder.
_PART = r"([^/\s.][^/\s]*|\.([^/\s.][^/\s]*)?|\.\.[^/\s]+)"
_PATH = rf"{_PART}(/+{_PART})*"
_HF_PART = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_HF = rf"{_HF_PART}/{_HF_PART}(@{_HF_PART}(/{_HF_PART})*)?"
_CLAIM = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
MODEL_URI = rf"^(hf://{_HF}|s3://{_BUCKET}/[^\s]+|pvc://{_CLAIM}(/+({_PATH}/*)?)?)$"
DATASET_URI = rf"^(hf://datasets/{_HF}/{_PATH}|s3://{_BUCKET}/[^\s]+|pvc://{_CLAIM}/+{_PATH}|configMap://{_CLAIM}/[A-Za-z0-9._-]+)$"
IMPORT_URI = rf"^(hf://{_HF}|s3://{_BUCKET}/[^\s]+/)$"
ARTIFACT_URI = r"^s3://[^/\s]+/[^\s]+/$"
# A version to publish, and an entry of AdapterDeployment.spec.adapters.
NEW_VERSION = r"^auto$|" + SEMVER
ADAPTER_REF = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?@(latest|\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2})$"

# What a value must be, for users who do not read regular expressions.
SENTENCES = {
    DNS_LABEL: "must be a name of lower-case letters, digits and -, which starts and ends with a letter or digit",
    DNS_NAME: "must be a name of lower-case letters, digits, - and ., which starts and ends with a letter or digit",
    SEMVER: "must be a version of three numbers, for example 1.4.2",
    NEW_VERSION: "must be auto or a version of three numbers, for example 1.4.2",
    VERSION_RANGE: "must be a version or a range of versions, for example 1.4.2, 1.4, ^1.4 or 2",
    ADAPTER_REF: "must be <adapter>@<version>, for example support@latest, support@1.4.2 or support@^1",
    MODEL_URI: "must be hf://<org>/<name>[@<revision>], s3://<bucket>/<folder> or pvc://<claim>[/<folder>], without spaces and ..",
    DATASET_URI: "must be hf://datasets/<org>/<name>[@<revision>]/<file>, s3://<bucket>/<file>, pvc://<claim>/<file> or "
    "configMap://<name>/<key>, without spaces and ..",
    IMPORT_URI: "must be hf://<org>/<name>[@<revision>] or s3://<bucket>/<folder>/ with a / at the end, without spaces",
    ARTIFACT_URI: "must be s3://<bucket>/<folder>/ with a / at the end, without spaces",
    SHA256: "must be sha256: and 64 hexadecimal digits",
}


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Return CEL rules for `json_schema_extra` from (expression, message) pairs. The API server checks them at apply
    time."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


class Schema(PydanticModel):
    """Base of every API model: camelCase in JSON, snake_case in Python. Unknown fields are refused.

    An error never quotes the value: it may be another user's secret.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", hide_input_in_errors=True
    )

    def wire(self) -> dict[str, Any]:
        """Return the object as JSON data: camelCase keys, without absent values."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Status(Schema):
    """Base of the status models. It ignores unknown fields, so it can read what an older or newer operator wrote."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True
    )

    @model_serializer(mode="wrap")
    def _without_empty_maps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty maps. If a map of an applied object loses its last key and is applied as {}, the API server
        merges it to null, and then refuses the object for ever."""
        return {key: value for key, value in handler(self).items() if value != {}}


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

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True
    )

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

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True
    )

    metadata: ObjectMeta


Conditions = Annotated[
    list[Condition],
    Field(
        default_factory=list,
        description="Conditions of the resource. docs/reference.md lists their reasons.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]

# No amount is negative. Kubernetes accepts only whole exponents, although the pattern of its own schema allows others.
QUANTITY = r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"

QUANTITY_LENGTH = 32  # characters

Quantities = Annotated[
    dict[str, str | int],
    Field(
        max_length=32,
        description="Amounts by resource name, as in a container: cpu, memory, ephemeral-storage, nvidia.com/gpu.",
        json_schema_extra={
            "additionalProperties": {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "pattern": QUANTITY,
                "maxLength": QUANTITY_LENGTH,
            }
        },
    ),
]


# Kubernetes's own checks of a container's resources (k8s.io/kubernetes/pkg/apis/core/validation). Without them, the API
# server accepts the spec and refuses the pods.
_KNOWN = "k in ['cpu', 'memory', 'ephemeral-storage']"
_LIMIT, _REQUEST = "quantity(string(self.limits[k]))", "quantity(string(self.requests[k]))"
RESOURCE_RULES = rules(
    (
        "!has(self.requests) || !has(self.limits) || "
        f"self.requests.all(k, !(k in self.limits) || {_REQUEST}.compareTo({_LIMIT}) <= 0)",
        "resources: a request must not be above the limit of the same name",
    ),
    (
        f"!has(self.requests) || self.requests.all(k, {_KNOWN} || "
        f"(has(self.limits) && k in self.limits && {_REQUEST}.compareTo({_LIMIT}) == 0))",
        "resources: devices such as nvidia.com/gpu belong to limits. If requests names one too, the amounts must be equal",
    ),
    (
        f"!has(self.limits) || self.limits.all(k, {_KNOWN} || {_LIMIT}.isInteger())",
        "resources: the amount of a device such as nvidia.com/gpu must be a whole number",
    ),
)


class Resources(Schema):
    """Resource requests and limits of a container, with the same fields as in a pod."""

    model_config = Schema.model_config | {"json_schema_extra": RESOURCE_RULES}

    requests: Quantities | None = Field(default=None, description="Amounts that the scheduler reserves on the node.")
    limits: Quantities | None = Field(
        default=None,
        description="Amounts that the container must not exceed. GPUs are requested here, as nvidia.com/gpu.",
    )

    def gpus(self) -> int:
        """Return the number of GPUs in limits, where the device plugin expects it."""
        return int(quantity((self.limits or {}).get(GPU, 0)))


class Toleration(Schema):
    """A taint that the pods tolerate, with the same fields as in a pod."""

    key: str | None = Field(
        default=None,
        pattern=rf"^$|{LABEL_KEY}",
        max_length=253,
        description="Key of the taint. If it is empty and operator is Exists, every key matches.",
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None,
        description="Exists: any value of the taint matches. Equal: the taint must have the same value. Equal when absent.",
    )
    value: str | None = Field(
        default=None, pattern=LABEL_VALUE, max_length=63, description="Value of the taint, for operator Equal."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. If it is empty, every effect matches."
    )
    toleration_seconds: int | None = Field(
        default=None,
        description="For effect NoExecute: seconds that a pod may stay on a node with the taint. No limit when absent.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "(has(self.key) && self.key != '') || (has(self.operator) && self.operator == 'Exists')",
                "toleration: give key, or operator Exists for every taint",
            ),
            (
                "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
                "toleration: value is not allowed with operator Exists",
            ),
            (
                "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
                "toleration: tolerationSeconds is allowed only with effect NoExecute",
            ),
        )
    }


# The usual taint of GPU nodes. The admission plugin ExtendedResourceToleration adds this toleration to pods that
# request GPUs. The plugin may be disabled, so Graft adds the toleration too.
GPU_TOLERATION = Toleration(key=GPU, operator="Exists", effect="NoSchedule")


def _label_key(text: str) -> str:
    if len(text) > 253 or re.fullmatch(LABEL_KEY, text) is None:
        raise ValueError("a key must be the key of a label, for example topology.kubernetes.io/zone")
    return text


class Placement(Schema):
    """Which nodes the pods may run on."""

    node_selector: (
        dict[Annotated[str, AfterValidator(_label_key)], Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)]]
        | None
    ) = Field(default=None, max_length=32, description="Labels that a node must have to run the pods.")
    tolerations: list[Toleration] | None = Field(
        default=None,
        max_length=64,
        description="Taints of nodes that the pods tolerate. The platform team lists the allowed ones in the chart's value "
        "tenants.allowedTolerations. By default this is only nvidia.com/gpu.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    priority_class_name: str | None = Field(
        default=None,
        pattern=rf"^$|{DNS_NAME}",
        max_length=253,
        description="Name of the pods' PriorityClass. The platform team lists the allowed ones in the chart's value "
        "tenants.allowedPriorityClasses. By default there are none. The cluster's default when absent.",
    )
    runtime_class_name: str | None = Field(
        default=None,
        pattern=rf"^$|{DNS_NAME}",
        max_length=253,
        description="Name of the pods' RuntimeClass, for example nvidia. The platform team lists the allowed ones in the chart's "
        "value tenants.allowedRuntimeClasses. By default this is only nvidia. The node's default runtime when absent.",
    )
