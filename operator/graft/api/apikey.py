"""ApiKey: a key with which clients call the gateway, and the models of its namespace that it may use."""

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

from graft.api.limits import ServingLimits
from graft.api.meta import Conditions, Resource, Schema, Status, rules
from graft.api.patterns import HEX_SHA256, MODEL_NAME, TIME

MOST_HASHES = 4
MOST_MODELS = 512  # as many as one AdapterDeployment may have routes
LONGEST_OVERLAP = 30 * 24 * 3600  # seconds


def _exists(text: str) -> str:
    """Return the time. Raises ValueError if there is no such day or hour."""
    datetime.fromisoformat(text)
    return text


class ApiKeySpec(Schema):
    """What the key may do, and until when."""

    description: str | None = Field(
        default=None, max_length=1024, description="Who uses the key, and for what. It is only for people."
    )
    models: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_MODELS,
        description="Routes of this namespace that the key may use: the part of a model's name after the /. All routes of this "
        "namespace when absent. A key never reaches another namespace's models.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": MODEL_NAME, "maxLength": 128},
        },
    )
    expires_at: Annotated[str, Field(pattern=TIME, max_length=40), AfterValidator(_exists)] | None = Field(
        default=None,
        description="From this time on, the key does not work. It never expires when absent.",
    )
    end_streams: bool = Field(
        default=False,
        description="Whether answers that are being streamed end when the key expires or is revoked. Otherwise they finish, and "
        "only new requests are refused.",
    )
    limits: ServingLimits | None = Field(
        default=None, description="What the clients of the key may use. There are no limits when absent."
    )
    rotation: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Change this number to get a new key in the same entry of the Secret. 0 when absent.",
    )
    overlap_seconds: int = Field(
        default=24 * 3600,
        ge=0,
        le=LONGEST_OVERLAP,
        description="Seconds for which the old key still works after a rotation. With 0, the old key is refused at once.",
    )
    sha256: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_HASHES,
        description="SHA-256 sums of keys that you have made yourself, in hexadecimal digits. The operator then makes no key and no "
        "Secret. Several sums are for a rotation: all of them work.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": HEX_SHA256, "maxLength": 64},
        },
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "!has(self.sha256) || !has(self.rotation)",
                "rotation makes a new key, and with sha256 the keys are yours: add the new key's sum to sha256 instead",
            ),
        )
    }


class ApiKeyStatus(Status):
    """Where the key is."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(default=None, description="Summary of the conditions: Ready, Expired or Waiting.")
    secret_name: str | None = Field(
        default=None, description="Secret of this namespace with the key. The entry has the name of the ApiKey."
    )
    fingerprint: str | None = Field(
        default=None, description="First 12 hexadecimal digits of the key's SHA-256, to recognise the key."
    )
    rotation: int | None = Field(default=None, description="The spec.rotation for which the present key was made.")
    rotated_at: str | None = Field(
        default=None,
        description="When the present key was made.",
        json_schema_extra={"format": "date-time"},
    )
    tokens_this_month: int | None = Field(
        default=None,
        description="Tokens that the gateways have leased for the key in this calendar month, if spec.limits has tokensPerMonth. It is "
        "looked at every 10 minutes.",
    )
    previous_until: str | None = Field(
        default=None,
        description="Until when the key before the last rotation works.",
        json_schema_extra={"format": "date-time"},
    )
    conditions: Conditions


class ApiKey(Resource):
    """A key with which clients call the gateway. It opens models of its own namespace only."""

    spec: ApiKeySpec
    status: ApiKeyStatus = Field(default_factory=lambda: ApiKeyStatus(conditions=[]))


CRD = {
    "kind": "ApiKey",
    "plural": "apikeys",
    "shortNames": ["ak"],
    "scope": "Namespaced",
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Secret", "string", ".status.secretName", 0),
        ("Expires", "string", ".spec.expiresAt", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Fingerprint", "string", ".status.fingerprint", 1),
        ("Description", "string", ".spec.description", 1),
        ("Message", "string", ".status.conditions[?(@.type=='Ready')].message", 0),
    ],
    "rules": rules(
        (
            "self.metadata.name.matches(r'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && self.metadata.name.size() <= 63",
            "metadata.name must be at most 63 characters, without dots, because it becomes a label value and the name of an entry "
            "of a Secret",
        ),
    ),
}
