"""Retention: how long the versions of an adapter are kept, and when their weights are compressed."""

from pydantic import Field

from graft.api.meta import Schema, rules
from graft.api.patterns import DURATION

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> int:
    """Return a duration such as 30d in seconds."""
    return int(duration[:-1]) * UNITS[duration[-1]]


class Retention(Schema):
    """What happens to unused versions of an adapter. The policy of the newest Ready version applies to all versions."""

    keep: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Number of newest versions that are never deleted. Only versions that may be served count, so rejected "
        "versions do not. Kept versions can still be compressed.",
    )
    unused_for: str | None = Field(
        default=None,
        pattern=DURATION,
        max_length=7,
        description="If a version has been unused for this long, the operator deletes it together with its files, even if "
        "deletionPolicy is Retain. Examples: 30d, 12h, 90m, 45s. Nothing is deleted when absent.",
    )
    compress_after: str | None = Field(
        default=None,
        pattern=DURATION,
        max_length=7,
        description="If a version has been unused for this long, the operator compresses its weights in storage. It restores "
        "them when the version is needed again. Examples: 30d, 12h, 90m, 45s. Nothing is compressed when absent.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.unusedFor) || has(self.compressAfter)", "retention: give unusedFor, compressAfter or both")
        )
    }
