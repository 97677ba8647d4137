"""What this gateway may still spend of the limits of each key, from the slices that it has leased (PURE)."""

from dataclasses import dataclass, field

from graft.contracts.usage import MINUTE, SLICES, SLOT_SECONDS, Allowance, Lease, Need, minute_of, month_after, month_of

from graft_server.gateway.errors import ApiError, exceeded, too_many_tokens

SLOTS_KNOWN = 1.0  # seconds for which it is known that all slots are taken
IDLE = 60.0  # seconds after which an account that nobody uses is given back


@dataclass
class Account:
    """The slices of one key or of one team. Times are in seconds since 1970."""

    allowance: Allowance
    whose: str = "The API key"  # in errors
    minute: int = 0
    month: int = 0
    requests: int = 0  # left of the slices; negative: spent before they were leased
    minute_tokens: int = 0
    month_tokens: int = 0
    slots: int = 0
    slots_until: float = 0.0  # from then on, other gateways may have them
    running: int = 0
    used: float = 0.0  # when it was used last
    wanted: int | None = None  # the tokens of a request that waits for a lease
    others: Need = field(default_factory=Need)  # left for all gateways at the last lease
    leased: float = 0.0  # when that was; 0: nothing was leased in these windows

    def allow(self, allowance: Allowance) -> None:
        """Take the limits as they are now. After a change, the next lease tells what is left of them."""
        if allowance != self.allowance:
            self.allowance, self.leased = allowance, 0.0

    def turn(self, now: float) -> None:
        """Forget the slices of windows that have ended, and what no limit counts."""
        if (minute := minute_of(now)) > self.minute:
            self.minute, self.requests, self.leased = minute, 0, 0.0
            self.minute_tokens = min(0, self.minute_tokens)  # a debt is paid in the next minute
        if (month := month_of(now)) > self.month:
            self.month, self.month_tokens, self.leased = month, min(0, self.month_tokens), 0.0
        if self.allowance.tokens_per_minute is None:
            self.minute_tokens = 0
        if self.allowance.tokens_per_month is None:
            self.month_tokens = 0
        if now >= self.slots_until:
            self.slots = 0

    def take(self, tokens: int, now: float) -> bool:
        """Spend a request with its tokens, if the slices have them."""
        self.used = now
        if any(self._missing(tokens)):
            return False
        self.requests -= 1
        self.minute_tokens -= tokens
        self.month_tokens -= tokens
        self.running += 1
        return True

    def settle(self, reserved: int, spent: int, minute: int, month: int, now: float) -> None:
        """End a request: give back the tokens that it did not spend, in the windows in which they were reserved.

        What it spent beyond its reservation is paid in the present windows.
        """
        self.turn(now)
        self.running -= 1
        self.used = now
        left = reserved - spent
        if self.minute == minute or left < 0:
            self.minute_tokens += left
        if self.month == month or left < 0:
            self.month_tokens += left

    def cancel(self, tokens: int, minute: int, month: int, now: float) -> None:
        """Take back a request that was refused elsewhere."""
        self.settle(tokens, 0, minute, month, now)
        if self.minute == minute:
            self.requests += 1

    def refusal(self, tokens: int, now: float) -> ApiError | None:
        """Return why a request is refused, or None if a lease may help. It is called after `take`."""
        limits, missing = self.allowance, Need(*self._missing(tokens))
        for what, limit in (
            ("tokens per minute", limits.tokens_per_minute),
            ("tokens per month", limits.tokens_per_month),
        ):
            if limit is not None and tokens > limit:
                return too_many_tokens(self.whose, what, limit, tokens)
        if not self.leased:
            return None
        minute = self.minute + MINUTE - now
        for what, limit, lacking, left, seconds in (
            ("requests per minute", limits.requests_per_minute, missing.requests, self.others.requests, minute),
            ("tokens per minute", limits.tokens_per_minute, missing.minute_tokens, self.others.minute_tokens, minute),
            (
                "tokens per month",
                limits.tokens_per_month,
                missing.month_tokens,
                self.others.month_tokens,
                month_after(now) - now,
            ),
        ):
            if lacking > left:
                return exceeded(self.whose, what, limit, seconds, self.headers(now))
        if missing.slots > self.others.slots and now - self.leased < SLOTS_KNOWN:
            what, slots = "concurrent requests", limits.concurrent_requests
            return exceeded(self.whose, what, slots, 1.0, self.headers(now))
        return None

    def need(self) -> Need:
        """Return what the next lease should bring: what one waiting request lacks, and the slots that are in use.

        Tokens beyond a slice are given back, so that other gateways can lease them. A large request has left them.
        """
        limits, tokens = self.allowance, self.wanted or 0
        missing = Need(*self._missing(tokens)) if self.wanted is not None else Need()
        slots = 0 if limits.concurrent_requests is None else self.running + (1 if self.wanted is not None else 0)
        return Need(
            missing.requests,
            missing.minute_tokens - _beyond(limits.tokens_per_minute, self.minute_tokens, tokens),
            missing.month_tokens - _beyond(limits.tokens_per_month, self.month_tokens, tokens),
            slots,
        )

    def add(self, lease: Lease, now: float) -> None:
        """Take a lease."""
        if lease.minute > self.minute:
            self.minute, self.requests, self.minute_tokens = lease.minute, 0, min(0, self.minute_tokens)
        if lease.month > self.month:
            self.month, self.month_tokens = lease.month, min(0, self.month_tokens)
        if lease.minute == self.minute:
            self.requests += lease.got.requests
            self.minute_tokens += lease.got.minute_tokens
        if lease.month == self.month:
            self.month_tokens += lease.got.month_tokens
        self.slots, self.slots_until = lease.got.slots, int(now) + SLOT_SECONDS
        self.wanted = None
        if (lease.minute, lease.month) == (self.minute, self.month):
            self.others, self.leased = lease.left, now

    def lose(self, lease: Lease) -> None:
        """Forget what was given back in a lease whose write got no answer: others may have it."""
        if lease.minute == self.minute:
            self.requests += min(0, lease.got.requests)
            self.minute_tokens += min(0, lease.got.minute_tokens)
        if lease.month == self.month:
            self.month_tokens += min(0, lease.got.month_tokens)

    def surplus(self) -> Need:
        """Return what is given back when the account is not used any more: negative amounts. A debt is leased."""
        return Need(-max(0, self.requests), -self.minute_tokens, -self.month_tokens, 0)

    def idle(self, now: float) -> bool:
        return self.running == 0 and self.wanted is None and now - self.used > IDLE

    def headers(self, now: float) -> dict[str, str]:
        """Return OpenAI's headers for the limits of a minute. What is left is what this gateway knows of."""
        found, seconds = {}, max(0, round(self.minute + MINUTE - now))
        for name, limit, left in (
            ("requests", self.allowance.requests_per_minute, self.requests + self.others.requests),
            ("tokens", self.allowance.tokens_per_minute, self.minute_tokens + self.others.minute_tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, min(limit, left)))
                found[f"x-ratelimit-reset-{name}"] = f"{seconds}s"
        return found

    def _missing(self, tokens: int) -> tuple[int, int, int, int]:
        """Return what the slices lack for one more request."""
        limits = self.allowance
        return (
            0 if limits.requests_per_minute is None else max(0, 1 - self.requests),
            0 if limits.tokens_per_minute is None else max(0, tokens - self.minute_tokens),
            0 if limits.tokens_per_month is None else max(0, tokens - self.month_tokens),
            0 if limits.concurrent_requests is None else max(0, self.running + 1 - self.slots),
        )


def _beyond(limit: int | None, tokens: int, wanted: int) -> int:
    """Return how many tokens are more than a slice and than a waiting request needs."""
    return 0 if limit is None else max(0, tokens - max(limit // SLICES, wanted))
