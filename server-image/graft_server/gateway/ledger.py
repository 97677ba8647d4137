"""The limits of keys over all gateways: slices are leased in the ConfigMap graft-usage, and spent here.

A lease reads, changes and writes the entries of all keys that need one, and the write fails if another gateway was first. So
no amount is leased twice. While the API server does not answer, a gateway spends what it has leased, and then refuses.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from graft.bounded import OutOfBounds
from graft.contracts.usage import SLOT_SECONDS, USAGE_CONFIGMAP, Allowance, Lease, Need, Usage, is_old, lease

from graft_server.configmaps import ConfigMaps, KubeError
from graft_server.gateway.accounts import Account
from graft_server.gateway.errors import no_lease

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
RENEW_SECONDS = SLOT_SECONDS / 3
PATIENCE = 5.0  # seconds that a request waits for a lease
ATTEMPTS = 20  # of one lease, while other gateways are first
PAUSE = 0.02  # seconds, the longest between two attempts
LEASED_AT_ONCE = 100  # entries
LOOKED_AT = 50  # entries of other keys in one lease


class Limit(NamedTuple):
    """One limit that holds for a request: under which key it is counted, what it allows, and whose it is."""

    key: str
    allowance: Allowance
    whose: str


class Reservation:
    """What one request may spend. `spent`: the tokens that it has spent, by the engines' counts."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._parts: list[tuple[Account, int, int]] = []  # with the windows in which the tokens were reserved
        self.headers: Mapping[str, str] = {}
        self.begun = False  # whether all limits have allowed the request
        self.uncounted = False  # whether an engine has worked, and has told no count yet
        self.spent = 0

    def add(self, account: Account, now: float) -> None:
        """Note an account from which the request was taken. The headers are those of the first one."""
        self.headers = self.headers or account.headers(now)
        self._parts.append((account, account.minute, account.month))

    def count(self, tokens: int) -> None:
        """Note what an engine has counted. 0: it has not counted."""
        self.spent += tokens
        self.uncounted = self.uncounted and not tokens

    def settle(self, now: float) -> None:
        """Give back what was not spent. If an engine worked and told no count, the whole reservation is spent."""
        spent = max(self.spent, self._tokens if self.uncounted else 0)
        for account, minute, month in self._parts:
            if self.begun:
                account.settle(self._tokens, spent, minute, month, now)
            else:
                account.cancel(self._tokens, minute, month, now)


class Ledger:
    """The accounts of one gateway, and their leases."""

    def __init__(self, configmaps: ConfigMaps, gateway: str, clock: Callable[[], float] = time.time) -> None:
        self._configmaps = configmaps
        self._gateway = gateway
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._known: dict[str, Any] | None = None  # the ConfigMap as it was read or written last
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._renewed = 0.0

    @asynccontextmanager
    async def reserved(self, limits: Sequence[Limit], tokens: int) -> AsyncIterator[Reservation]:
        """Spend a request and its tokens. What it does not spend is given back at the end. Raises ApiError 429."""
        reservation = Reservation(tokens)
        try:
            for limit in limits:
                reservation.add(await self._taken(limit, tokens), self._clock())
            reservation.begun = True
            yield reservation
        finally:
            reservation.settle(self._clock())

    async def _taken(self, limit: Limit, tokens: int) -> Account:
        """Take a request from an account, and lease more if it is empty. Raises ApiError 429."""
        account = self._accounts.setdefault(limit.key, Account(limit.allowance, limit.whose))
        account.allow(limit.allowance)
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self._clock()
            account.turn(now)
            if account.take(tokens, now):
                return account
            if (refused := account.refusal(tokens, now)) is not None:
                raise refused
            changed, account.wanted = self._changed, tokens
            self._asked.set()
            try:
                await asyncio.wait_for(changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise no_lease() from None

    async def run(self) -> None:
        """Lease what requests need, until cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), TICK_SECONDS)
            self._asked.clear()
            try:
                await self._lease_all(self._due())
            except KubeError as error:
                self._known = None
                log.warning("cannot lease what keys may use, retrying: %s", error, extra={"status": error.status})
                await asyncio.sleep(TICK_SECONDS)

    async def close(self) -> None:
        """Give back what is left of the slices. A debt leases a slice, so the rest of that is given back, too."""
        with suppress(KubeError):
            for _ in range(2):
                await self._lease_all({key: account.surplus() for key, account in self._accounts.items()})

    def _due(self) -> dict[str, Need]:
        """Return the accounts that need a lease and, every RENEW_SECONDS, those with slots, too many tokens or no clients."""
        now = self._clock()
        renew = now - self._renewed >= RENEW_SECONDS
        found = {}
        for key, account in self._accounts.items():
            if account.wanted is None and not renew:
                continue
            account.turn(now)
            need = account.need()
            if account.wanted is not None or account.slots or any(need):
                found[key] = need
            elif account.idle(now):
                found[key] = account.surplus()
        if renew:
            self._renewed = now
        return found

    async def _lease_all(self, needs: Mapping[str, Need]) -> None:
        """Lease for some accounts at a time. In between, the gateway answers its clients."""
        keys = list(needs)
        for start in range(0, len(keys), LEASED_AT_ONCE):
            await self._lease({key: needs[key] for key in keys[start : start + LEASED_AT_ONCE]})

    async def _lease(self, needs: Mapping[str, Need]) -> None:
        for attempt in range(ATTEMPTS):
            if self._known is None:
                self._known = await self._configmaps.get(USAGE_CONFIGMAP)
            now = self._clock()
            entries = self._known.get("data") or {}
            after: dict[str, str | None] = dict.fromkeys(self._old(entries, needs, now))
            leases: dict[str, Lease] = {}
            for key, need in needs.items():
                usage = _read(entries.get(key), key)
                usage, leases[key] = lease(usage, self._accounts[key].allowance, self._gateway, need, now)
                after[key] = usage.json_text()
            try:
                self._known = await self._configmaps.replace_keys(USAGE_CONFIGMAP, self._known, after)
            except KubeError as error:
                self._known = None
                if error.status == 0 or error.status >= 500:  # it may have been written
                    for key, item in leases.items():
                        self._accounts[key].lose(item)
                if error.status != 409 or attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(random.uniform(0, PAUSE))  # noqa: S311 - so that gateways do not meet again
                continue
            self._take(leases, now)
            return

    def _take(self, leases: Mapping[str, Lease], now: float) -> None:
        for key, item in leases.items():
            account = self._accounts[key]
            account.add(item, now)
            if account.idle(now) and not account.slots and not any(part > 0 for part in item.got):
                del self._accounts[key]
        self._changed.set()
        self._changed = asyncio.Event()

    def _old(self, entries: Mapping[str, str], needs: Mapping[str, Need], now: float) -> list[str]:
        """Return some entries that no longer count. The ConfigMap must not grow without end.

        Each lease looks at a few of them, because to read thousands would stop the answers of all clients meanwhile.
        """
        some = random.sample(list(entries), min(LOOKED_AT, len(entries)))
        return [key for key in some if key not in needs and is_old(_read(entries[key], key), now)]


def _read(text: str | None, key: str) -> Usage:
    """Return an entry. One that cannot be read counts as new: only gateways and the platform team write it."""
    if text is None:
        return Usage()
    try:
        return Usage.read(text)
    except OutOfBounds as error:
        log.error("the entry %s of %s is invalid and begins anew: %s", key, USAGE_CONFIGMAP, error)
        return Usage()
