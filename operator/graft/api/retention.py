"""Retention: how long the versions of an adapter are kept, and when they are compressed."""

from pydantic import Field

from graft.api.meta import Schema, rules

DURATION = r"^[1-9][0-9]{0,5}[smhd]$"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> int:
    """30d as seconds."""
    return int(duration[:-1]) * UNITS[duration[-1]]


class Retention(Schema):
    """What happens to versions that nobody uses; the policy of the newest Ready version is the adapter's."""

    keep: int = Field(
        default=3, ge=1, le=1000, description="So many of the newest versions that may be served are never pruned."
    )
    unused_for: str | None = Field(
        default=None,
        pattern=DURATION,
        description="A version that nobody used for so long is deleted, and its files with it, whatever deletionPolicy says: "
        "30d, 12h, 90m or 45s. Nothing is deleted when absent.",
    )
    compress_after: str | None = Field(
        default=None,
        pattern=DURATION,
        description="The weights of a version that nobody used for so long are compressed in storage, and restored when it is "
        "wanted again: 30d, 12h, 90m or 45s. Nothing is compressed when absent.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.unusedFor) || has(self.compressAfter)", "retention: give unusedFor, compressAfter or both")
        )
    }
