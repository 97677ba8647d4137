"""What all kinds share: the base class of the schema, conditions, and the names of the API group.

The pydantic models of this package are the only schema. `graft.crdgen` generates the CustomResourceDefinitions and
docs/reference.md from them. The operator parses live objects with them.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic import BaseModel as PydanticModel
from pydantic.alias_generators import to_camel

from graft.api.patterns import (
    DNS_NAME_OR_EMPTY,
    LABEL_KEY,
    LABEL_KEY_OR_EMPTY,
    LABEL_VALUE,
    QUANTITY,
    QUANTITY_LENGTH,
    SENTENCES,
)
from graft.api.quantity import quantity

GROUP = "graft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
GPU = "nvidia.com/gpu"  # resource name of the device plugin, and key of the usual taint


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
    """Base of all kinds: metadata, next to a typed spec and status."""

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

# The schema of one amount: a number, or a text such as 500m or 4Gi.
AMOUNT: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "x-kubernetes-int-or-string": True,
    "pattern": QUANTITY,
    "maxLength": QUANTITY_LENGTH,
}

Quantities = Annotated[
    dict[str, str | int],
    Field(
        max_length=7,  # with more, the rules cost too much for Kubernetes before 1.34
        description="Amounts by resource name, as in a container: cpu, memory, ephemeral-storage, nvidia.com/gpu.",
        json_schema_extra={"additionalProperties": AMOUNT},
    ),
]


# Kubernetes's own checks of a container's resources (k8s.io/kubernetes/pkg/apis/core/validation). Without them, the API
# server accepts the spec and refuses the pods.
_KNOWN = "k in ['cpu', 'memory', 'ephemeral-storage']"
_LIMIT, _REQUEST = "self.limits[k]", "self.requests[k]"


def _compared(operator: str) -> str:
    """Return the CEL expression that compares the request and the limit of `k`.

    A value that is no amount passes: it has a rule of its own, and an error here would hide that rule's message. Texts are
    not made of numbers first, because Kubernetes before 1.34 estimates each such step with 3 MB.
    """
    return (
        f"(type({_LIMIT}) == int ? "
        f"(type({_REQUEST}) == int ? {_REQUEST} {operator} {_LIMIT} : "
        f"!isQuantity({_REQUEST}) || sign(quantity({_REQUEST}).sub({_LIMIT})) {operator} 0) : "
        f"!isQuantity({_LIMIT}) || (type({_REQUEST}) == int ? 0 {operator} sign(quantity({_LIMIT}).sub({_REQUEST})) : "
        f"!isQuantity({_REQUEST}) || quantity({_REQUEST}).compareTo(quantity({_LIMIT})) {operator} 0))"
    )


RESOURCE_RULES = rules(
    (
        f"!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || {_compared('<=')})",
        "resources: a request must not be above the limit of the same name",
    ),
    (
        f"!has(self.requests) || self.requests.all(k, {_KNOWN} || "
        f"(has(self.limits) && k in self.limits && {_compared('==')}))",
        "resources: devices such as nvidia.com/gpu belong to limits. If requests names one too, the amounts must be equal",
    ),
    (
        f"!has(self.limits) || self.limits.all(k, {_KNOWN} || type({_LIMIT}) == int || !isQuantity({_LIMIT}) || "
        f"quantity({_LIMIT}).isInteger())",
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
        pattern=LABEL_KEY_OR_EMPTY,
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


def label_key(text: str) -> str:
    """Return the key of a label. Raises ValueError if it has another form."""
    if len(text) > 253 or re.fullmatch(LABEL_KEY, text) is None:
        raise ValueError(f"a key {SENTENCES[LABEL_KEY]}")
    return text


def label_keys(field: str) -> dict[str, Any]:
    """Return the rule for the keys of a map of labels."""
    return rules((f"self.all(k, k.matches(r'{LABEL_KEY}'))", f"{field}: a key {SENTENCES[LABEL_KEY]}"))


class Placement(Schema):
    """Which nodes the pods may run on."""

    node_selector: (
        dict[Annotated[str, AfterValidator(label_key)], Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)]]
        | None
    ) = Field(
        default=None,
        max_length=32,
        description="Labels that a node must have to run the pods.",
        json_schema_extra=label_keys("nodeSelector"),
    )
    tolerations: list[Toleration] | None = Field(
        default=None,
        max_length=64,
        description="Taints of nodes that the pods tolerate. The platform team lists the allowed ones in the chart's value "
        "tenants.allowedTolerations. By default this is only nvidia.com/gpu.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    priority_class_name: str | None = Field(
        default=None,
        pattern=DNS_NAME_OR_EMPTY,
        max_length=253,
        description="Name of the pods' PriorityClass. The platform team lists the allowed ones in the chart's value "
        "tenants.allowedPriorityClasses. By default there are none. The cluster's default when absent.",
    )
    runtime_class_name: str | None = Field(
        default=None,
        pattern=DNS_NAME_OR_EMPTY,
        max_length=253,
        description="Name of the pods' RuntimeClass, for example nvidia. The platform team lists the allowed ones in the chart's "
        "value tenants.allowedRuntimeClasses. By default this is only nvidia. The node's default runtime when absent.",
    )
