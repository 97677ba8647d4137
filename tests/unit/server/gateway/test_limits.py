"""The limits of a key over several gateways: what is leased, spent and given back."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
from graft.contracts.usage import (
    SLOT_SECONDS,
    Allowance,
    Need,
    Slots,
    Usage,
    Window,
    is_old,
    lease,
    minute_of,
    month_after,
    month_of,
)
from graft_server.configmaps import ConfigMaps
from graft_server.gateway.accounts import Account
from graft_server.gateway.errors import ApiError
from graft_server.gateway.fields import most_tokens
from graft_server.gateway.ledger import Ledger, Limit
from worlds.gateway import Record
from worlds.serving import eventually

NOW = 1_796_083_230.0  # 2026-12-01, 30 s after a minute began
LIMITS = Allowance(requests_per_minute=100, tokens_per_minute=1000, tokens_per_month=5000, concurrent_requests=10)


def refused(account: Account, tokens: int, now: float = NOW) -> str | None:
    error = account.refusal(tokens, now)
    return None if error is None else f"{error.code} {error}"


class Gateway:
    """One gateway's account, and the entry that all gateways share."""

    def __init__(self, name: str, shared: list[Usage], allowance: Allowance = LIMITS) -> None:
        self.name, self.shared = name, shared
        self.account = Account(allowance)

    def lease(self, now: float, need: Need | None = None) -> None:
        wanted = self.account.need() if need is None else need
        self.shared[0], got = lease(self.shared[0], self.account.allowance, self.name, wanted, now)
        self.account.add(got, now)

    def ask(self, tokens: int, now: float) -> ApiError | None:
        """Reserve a request. Return why it is refused, or None."""
        for _ in range(200):
            self.account.turn(now)
            if self.account.take(tokens, now):
                return None
            if (error := self.account.refusal(tokens, now)) is not None:
                return error
            self.account.wanted = tokens
            self.lease(now)
        raise AssertionError("neither answered nor refused")

    def end(self, reserved: int, spent: int, now: float) -> None:
        self.account.settle(reserved, spent, minute_of(now), month_of(now), now)


def gateways(count: int = 3, **limits: int) -> list[Gateway]:
    shared = [Usage()]
    return [Gateway(f"gw-{number}", shared, Allowance(**limits)) for number in range(count)]


def test_windows() -> None:
    assert minute_of(NOW) == NOW - 30
    assert month_of(NOW) == 1_796_083_200 and month_after(NOW) == 1_796_083_200 + 31 * 24 * 3600
    assert month_after(1_798_761_599) == 1_798_761_600  # the last second of a year


@pytest.mark.parametrize("seed", range(20))
def test_together_they_never_answer_more_than_the_limit(seed: int) -> None:
    chance = random.Random(seed)
    limits = {"requests_per_minute": chance.randint(1, 120), "tokens_per_minute": chance.randint(50, 5000)}
    all_of_them = gateways(chance.randint(1, 4), **limits)
    for minute in range(3):
        now, answered, tokens = NOW + 60 * minute, 0, 0
        for _ in range(400):
            one, reserved = chance.choice(all_of_them), chance.randint(1, 50)
            if one.ask(reserved, now) is None:
                spent = chance.randint(0, reserved)
                one.end(reserved, spent, now)
                answered, tokens = answered + 1, tokens + spent
        assert answered <= limits["requests_per_minute"] and tokens <= limits["tokens_per_minute"]
        # What is left is a part of one slice in each gateway.
        if limits["tokens_per_minute"] > 2500:
            assert answered >= min(400, limits["requests_per_minute"]) - len(all_of_them) * 8


def test_what_is_not_spent_is_given_back() -> None:
    (one,) = gateways(1, tokens_per_minute=100)
    for _ in range(46):  # only two could be reserved at once: each reserves 50 and spends 1
        assert one.ask(50, NOW) is None
        one.end(50, 1, NOW)
    assert one.ask(54, NOW) is None
    error = one.ask(1, NOW)
    assert error is not None and error.code == "rate_limit_exceeded" and error.retry_after == 30
    assert one.ask(50, NOW + 30) is None


def test_what_was_spent_beyond_the_reservation_is_paid_in_the_next_minute() -> None:
    (one,) = gateways(1, tokens_per_minute=100)
    assert one.ask(50, NOW) is None
    one.end(50, 150, NOW)
    assert one.ask(1, NOW) is not None
    error = one.ask(10, NOW + 30)
    assert error is not None and error.code == "rate_limit_exceeded"
    assert one.ask(60, NOW + 90) is None


def test_a_request_larger_than_the_limit_is_told_to_be_smaller() -> None:
    (one,) = gateways(1, tokens_per_minute=100)
    error = one.ask(101, NOW)
    assert error is not None and error.code == "request_too_large" and error.retry_after is None


def test_a_month_outlives_minutes_and_gateways() -> None:
    first, second = gateways(2, tokens_per_month=1000)
    spent = 0
    for minute in range(30):
        now = NOW + 60 * minute
        if first.ask(20, now) is None:
            first.end(20, 20, now)
            spent += 20
    assert spent == 600
    left = 0
    while second.ask(20, NOW + 3600) is None:  # the first was killed: what it held of a slice is lost
        second.end(20, 20, NOW + 3600)
        left += 20
    assert 1000 - 1000 // 16 - 20 <= spent + left <= 1000
    error = second.ask(20, NOW + 3600)
    assert error is not None and error.retry_after == month_after(NOW) - (NOW + 3600)
    assert second.ask(20, float(month_after(NOW))) is None


def test_slots_are_free_again_after_an_answer_and_after_a_gateway_was_killed() -> None:
    first, second = gateways(2, concurrent_requests=3)
    assert [first.ask(1, NOW), first.ask(1, NOW), second.ask(1, NOW)] == [None, None, None]
    error = second.ask(1, NOW)
    assert error is not None and "concurrent requests" in str(error) and error.retry_after == 1
    first.end(1, 1, NOW)
    first.lease(NOW + 2)  # the renewal, which gives back what is not in use
    assert second.ask(1, NOW + 2) is None
    assert second.ask(1, NOW + 4) is not None
    later = NOW + 2 + SLOT_SECONDS + 1  # the first renews no more
    second.lease(later)
    assert second.ask(1, later) is None


def test_a_gateway_whose_clock_is_late_counts_in_the_newer_window() -> None:
    first, second = gateways(2, requests_per_minute=10)
    for _ in range(10):
        assert first.ask(1, NOW + 30) is None
    error = second.ask(1, NOW + 29)
    assert error is not None and error.code == "rate_limit_exceeded"


def test_a_lease_that_is_given_back_serves_others() -> None:
    first, second = gateways(2, requests_per_minute=16)
    assert first.ask(1, NOW) is None
    first.lease(NOW, Need(requests=5))
    first.lease(NOW, first.account.surplus()._replace(requests=-5))
    assert [second.ask(1, NOW) for _ in range(15)] == [None] * 15


def test_headers_are_those_of_openai() -> None:
    (one,) = gateways(1, requests_per_minute=100, tokens_per_minute=1000)
    assert one.ask(100, NOW) is None
    assert one.account.headers(NOW) == {
        "x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "99", "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "900", "x-ratelimit-reset-tokens": "30s",
    }  # fmt: skip


def test_entries_that_no_longer_count_are_dropped() -> None:
    month = month_of(NOW)
    for usage, old in (
        (Usage(), True),
        (Usage(minute=Window(start=int(NOW), requests=5)), False),
        (Usage(minute=Window(start=int(NOW) - 4000, requests=5)), True),
        (Usage(month=Window(start=month, tokens=5)), False),
        (Usage(month=Window(start=month - 1, tokens=5)), True),
        (Usage(slots={"a": Slots(count=1, until=int(NOW) + 1)}), False),
        (Usage(slots={"a": Slots(count=1, until=int(NOW) - 1)}), True),
    ):
        assert is_old(usage, NOW) == old, usage


REQUESTS: list[tuple[dict[str, Any], int]] = [
    ({"prompt": "x" * 400, "max_tokens": 10}, 101 + 10),
    ({"prompt": [1] * 50, "max_tokens": 10}, 60),
    ({"prompt": ["a", "b", "c"], "max_tokens": 10}, 4 + 30),
    ({"messages": [{"role": "user", "content": "x" * 400}], "max_completion_tokens": 7, "n": 3}, 109 + 21),
    ({"prompt": ""}, 1 + 512),
    ({"messages": [], "max_tokens": 1, "tools": ["x" * 396]}, 1 + 100 + 1),
]


@pytest.mark.parametrize(("payload", "tokens"), REQUESTS)
def test_a_request_reserves_its_prompt_and_all_answers(payload: dict[str, Any], tokens: int) -> None:
    assert most_tokens(payload, 512) == tokens


def test_what_a_large_request_has_not_used_serves_other_gateways() -> None:
    first, second = gateways(2, tokens_per_minute=1600, tokens_per_month=1600)
    assert first.ask(1600, NOW) is None
    first.end(1600, 10, NOW)
    first.lease(NOW + 5)  # the renewal
    assert second.ask(1400, NOW + 5) is None
    assert first.ask(90, NOW + 5) is None  # it has kept a slice


def test_a_limit_that_is_new_does_not_count_what_was_used_before() -> None:
    (one,) = gateways(1, requests_per_minute=100)
    for minute in range(10):
        assert one.ask(5000, NOW + 60 * minute) is None
        one.end(5000, 5000, NOW + 60 * minute)
    one.account.allow(Allowance(tokens_per_minute=1000, tokens_per_month=5000))
    assert one.ask(1000, NOW + 601) is None


def test_a_limit_that_is_raised_holds_at_once() -> None:
    (one,) = gateways(1, requests_per_minute=1)
    assert one.ask(1, NOW) is None
    assert one.ask(1, NOW) is not None
    one.account.allow(Allowance(requests_per_minute=2))
    assert one.ask(1, NOW) is None


def test_a_limit_that_is_lowered_takes_the_slice_back() -> None:
    first, second = gateways(2, tokens_per_month=160_000)
    assert first.ask(10, NOW) is None
    first.end(10, 10, NOW)
    for one in (first, second):
        one.account.allow(Allowance(tokens_per_month=1600))
    first.lease(NOW + 5)
    assert second.ask(1400, NOW + 5) is None


def test_a_request_that_lasts_into_the_next_minute_pays_for_what_it_had_not_reserved() -> None:
    (one,) = gateways(1, tokens_per_minute=100, tokens_per_month=1000)
    assert one.ask(10, NOW) is None
    one.account.settle(10, 90, minute_of(NOW), month_of(NOW), NOW + 31)
    assert one.ask(30, NOW + 31) is not None


def test_the_debt_of_a_month_outlives_the_account() -> None:
    first, second = gateways(2, tokens_per_month=1600)
    assert first.ask(10, NOW) is None
    first.end(10, 1000, NOW)
    later = NOW + 600
    first.account.turn(later)
    for _ in range(2):
        first.lease(later, first.account.surplus())
    assert first.shared[0].month == Window(start=month_of(NOW), tokens=1000)
    assert second.ask(700, later) is not None


def test_slots_that_are_not_renewed_are_not_used() -> None:
    first, second = gateways(2, concurrent_requests=3)
    assert [first.ask(1, NOW) for _ in range(3)] == [None] * 3
    for _ in range(3):
        first.end(1, 1, NOW)
    later = NOW + SLOT_SECONDS  # the first could not reach the API server
    assert [second.ask(1, later) for _ in range(3)] == [None] * 3
    first.account.turn(later)
    assert not first.account.take(1, later)


def test_a_lease_of_the_minute_before_says_nothing_of_this_one() -> None:
    (one,) = gateways(1, requests_per_minute=1)
    assert one.ask(1, NOW) is None
    one.shared[0], late = lease(one.shared[0], one.account.allowance, "gw-0", one.account.need(), NOW + 29)
    one.account.turn(NOW + 30)  # the answer to the write arrives after the minute
    one.account.add(late, NOW + 29)
    assert one.ask(1, NOW + 30) is None


async def test_what_a_gateway_holds_and_owes_is_settled_when_it_stops() -> None:
    record = Record({})
    ledger = Ledger(cast(ConfigMaps, record), "gw-0", lambda: NOW)
    running = asyncio.create_task(ledger.run())
    async with ledger.reserved(
        [Limit("team-a.web", Allowance(tokens_per_month=1600), "The API key")], 10
    ) as reservation:
        reservation.spent = 110
    running.cancel()
    await ledger.close()
    assert record.month("team-a.web") == 110


async def test_tokens_are_given_back_once_even_if_the_answer_to_the_write_is_lost() -> None:
    record, now = Record({}), [NOW]
    ledger = Ledger(cast(ConfigMaps, record), "gw-0", lambda: now[0])
    running = asyncio.create_task(ledger.run())
    limit = Limit("team-a.web", Allowance(tokens_per_month=1600), "The API key")
    async with ledger.reserved([limit], 100) as reservation:
        reservation.spent = 100
    async with ledger.reserved([limit], 10) as reservation:
        reservation.spent = 10
    assert record.month("team-a.web") == 200
    record.lost, now[0] = 1, NOW + 61
    await eventually(lambda: not record.lost)
    now[0] += 10
    await eventually(lambda: not ledger._accounts)
    assert record.month("team-a.web") == 110
    running.cancel()


async def test_many_keys_do_not_lease_at_once() -> None:
    record = Record({})
    ledger = Ledger(cast(ConfigMaps, record), "gw-0", lambda: NOW)
    async with AsyncExitStack() as stack:
        wait = [
            stack.enter_async_context(ledger.reserved([Limit(f"team-a.{number}", LIMITS, "The API key")], 1))
            for number in range(250)
        ]
        waiting = asyncio.gather(*wait)
        await eventually(lambda: len(ledger._accounts) == 250)
        running = asyncio.create_task(ledger.run())
        await waiting
    assert record.writes == 3
    running.cancel()


async def test_a_lease_does_not_read_the_entries_of_thousands_of_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Usage(minute=Window(start=int(NOW) - 4000)).json_text()
    record, read = Record({f"team-b.{number}": old for number in range(5000)}), list[str]()
    real = Usage.read
    monkeypatch.setattr(Usage, "read", lambda text: read.append(text) or real(text))
    ledger = Ledger(cast(ConfigMaps, record), "gw-0", lambda: NOW)
    running = asyncio.create_task(ledger.run())
    async with ledger.reserved([Limit("team-a.web", LIMITS, "The API key")], 1):
        pass
    assert 0 < len(read) <= 100
    assert len(record.data) == 5001 - len(read)
    running.cancel()
