"""Between gateways: what they have leased of the limits of a key, in the ConfigMap graft-usage (PURE).

Each gateway leases slices, and answers from its slices without asking. The entry of a key holds the sum of all leases of a
window, so together the gateways never lease more than the limit. What a gateway has leased and not used when it is killed
is lost until the window ends.
"""

from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

from pydantic import Field

from graft.bounded import Limits
from graft.contracts.message import Message, Name, Whole

USAGE_CONFIGMAP = "graft-usage"  # in the operator's namespace, which creates it
USAGE_COMPONENT = "usage"
SLICES = 16  # of a limit; a gateway leases one at a time, or as much as one request needs
MINUTE = 60
SLOT_SECONDS = 15  # after which the slots of a gateway that does not renew them are free again
OLD = 3600  # seconds after which the entry of a key that nobody uses is dropped


class Allowance(Message):
    """The limits of a key. None: there is no limit."""

    requests_per_minute: Whole | None = None
    tokens_per_minute: Whole | None = None
    tokens_per_month: Whole | None = None
    concurrent_requests: Whole | None = None


class Window(Message):
    """What all gateways have leased in one window of time."""

    start: Whole  # seconds since 1970
    requests: Whole = 0
    tokens: Whole = 0


class Slots(Message):
    """How many requests one gateway may answer at once."""

    count: Whole
    until: Whole  # seconds since 1970


class Usage(Message):
    """The entry of one key."""

    limits: ClassVar[Limits] = Limits(64 * 1024, depth=4, values=5000)

    minute: Window | None = None
    month: Window | None = None
    slots: dict[Name, Slots] = Field(default_factory=dict)  # by gateway


class Need(NamedTuple):
    """What a gateway asks for. `slots`: how many it needs in all. Negative amounts are given back."""

    requests: int = 0
    minute_tokens: int = 0
    month_tokens: int = 0
    slots: int = 0


class Lease(NamedTuple):
    """What a gateway got, and what was left for others then. The starts of the windows are in seconds since 1970."""

    minute: int
    month: int
    got: Need
    left: Need


def usage_key(namespace: str, name: str) -> str:
    """Return the key of an ApiKey in graft-usage."""
    return f"{namespace}.{name}"


def tenant_usage_key(tenant: str) -> str:
    """Return the key of a Tenant in graft-usage. No namespace begins with an underscore."""
    return f"_tenant.{tenant}"


def minute_of(now: float) -> int:
    """Return the start of the minute."""
    return int(now) // MINUTE * MINUTE


def month_of(now: float) -> int:
    """Return the start of the month, in UTC."""
    at = datetime.fromtimestamp(now, UTC)
    return int(datetime(at.year, at.month, 1, tzinfo=UTC).timestamp())


def month_after(now: float) -> int:
    """Return the start of the next month, in UTC."""
    return month_of(month_of(now) + 32 * 24 * 3600)  # no month has 32 days


def lease(usage: Usage, allowance: Allowance, gateway: str, need: Need, now: float) -> tuple[Usage, Lease]:
    """Lease a slice of each limit for a gateway. Return the entry as it is then, and the lease."""
    minute = _window(usage.minute, minute_of(now))
    month = _window(usage.month, month_of(now))
    requests, requests_left = _slice(allowance.requests_per_minute, minute.requests, need.requests)
    tokens, tokens_left = _slice(allowance.tokens_per_minute, minute.tokens, need.minute_tokens)
    monthly, monthly_left = _slice(allowance.tokens_per_month, month.tokens, need.month_tokens)
    slots, mine, slots_left = _slots(usage, allowance.concurrent_requests, gateway, need.slots, now)
    after = Usage(
        minute=minute.model_copy(
            update={"requests": max(0, minute.requests + requests), "tokens": max(0, minute.tokens + tokens)}
        ),
        month=month.model_copy(update={"tokens": max(0, month.tokens + monthly)}),
        slots=slots,
    )
    got = Need(requests, tokens, monthly, mine)
    return after, Lease(minute.start, month.start, got, Need(requests_left, tokens_left, monthly_left, slots_left))


def _window(found: Window | None, start: int) -> Window:
    """Return the present window. One that begins later is kept: the clock of this gateway is late."""
    return found if found is not None and found.start >= start else Window(start=start)


def _slice(limit: int | None, leased: int, need: int) -> tuple[int, int]:
    """Return how much is leased now, and how much is left then."""
    if limit is None:
        return 0, 0
    left = max(0, limit - leased)
    if need <= 0:
        return max(need, -leased), left
    got = min(left, max(need, limit // SLICES))
    return got, left - got


def _slots(usage: Usage, limit: int | None, gateway: str, need: int, now: float) -> tuple[dict[str, Slots], int, int]:
    """Return the slots of all gateways, those of this one, and how many are left."""
    if limit is None:
        return {}, 0, 0
    others = {name: item for name, item in usage.slots.items() if item.until > now and name != gateway}
    free = max(0, limit - sum(item.count for item in others.values()))
    mine = min(free, max(need, limit // SLICES)) if need > 0 else 0
    own = {gateway: Slots(count=mine, until=int(now) + SLOT_SECONDS)} if mine else {}
    return others | own, mine, free - mine


def is_old(usage: Usage, now: float) -> bool:
    """Return whether nothing in an entry counts any more."""
    recent = usage.minute is not None and usage.minute.start > now - OLD
    monthly = usage.month is not None and usage.month.start >= month_of(now) and usage.month.tokens > 0
    return not (recent or monthly or any(item.until > now for item in usage.slots.values()))
