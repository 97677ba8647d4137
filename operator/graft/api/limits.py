"""The limits of a gateway's clients: of an API key, and of a team."""

from pydantic import Field

from graft.api.meta import Schema

MOST = 1_000_000_000


class ServingLimits(Schema):
    """What clients may use together, over all gateways. There is no limit where a field is absent."""

    requests_per_minute: int | None = Field(
        default=None, ge=1, le=MOST, description="Number of requests that begin within a minute."
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Number of tokens of prompts and answers within a minute. A request reserves its prompt and its max_tokens, and gives back "
        "what it does not use.",
    )
    tokens_per_month: int | None = Field(
        default=None,
        ge=1,
        le=1000 * MOST,
        description="Number of tokens of prompts and answers within a calendar month, in UTC.",
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, le=MOST, description="Number of requests that are answered at once."
    )
