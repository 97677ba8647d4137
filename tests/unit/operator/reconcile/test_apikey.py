"""The decisions about an ApiKey: which key its Secret has, what the gateways accept, and what its status says."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from graft.api import ApiKey
from graft.contracts.apikeys import KEY, STATE, Grant, KeyState, new_api_key
from graft.contracts.enginekeys import fingerprint
from graft.contracts.usage import Allowance
from graft.reconcile import apikey
from graft.reconcile.apikey import Held
from graft.reconcile.claims import claim_of
from graft.reconcile.shared.access import Trouble
from pydantic import ValidationError

AT = datetime(2026, 11, 30, 12, tzinfo=UTC)
OLD = new_api_key()


def resource(**spec: Any) -> ApiKey:
    metadata = {"name": "web", "namespace": "team-a", "uid": "u1", "generation": 1}
    return ApiKey.model_validate({"metadata": metadata, "spec": spec})


def secret(**entries: str) -> dict[str, Any]:
    data = {name.replace("_", "."): base64.b64encode(text.encode()).decode() for name, text in entries.items()}
    return {"metadata": {"name": "graft-api-keys", "labels": {}}, "data": data}


def state(rotation: int = 0, **fields: Any) -> KeyState:
    return KeyState(rotation=rotation, since="2026-11-30T11:00:00Z", **fields)


def test_a_key_is_made_once() -> None:
    made = apikey.next_key(resource(), None, AT)
    assert KEY.fullmatch(made.key) and made.state == KeyState(rotation=0, since="2026-11-30T12:00:00Z")
    kept = apikey.held_in(secret(web=made.key, web_state=made.state.json_text()), "web")
    assert kept == made and apikey.next_key(resource(), kept, AT + timedelta(days=9)) is kept


@pytest.mark.parametrize("text", ["", "hello", "graft_short", OLD + "\n", OLD + "x"])
def test_a_key_of_another_form_is_replaced(text: str) -> None:
    """Who may write the Secret could set a key that can be guessed."""
    assert apikey.held_in(secret(web=text), "web") is None
    assert apikey.held_in({"metadata": {}, "data": {"web": "*"}}, "web") is None
    assert apikey.held_in(None, "web") is None and apikey.held_in({"metadata": {}}, "web") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"rotation": 0}',
        '{"rotation": 0, "since": "20261130"}',
        '{"rotation": 0, "since": "yesterday"}',
        "[" * 9000,
    ],
)
def test_a_key_without_its_state_is_kept(text: str) -> None:
    held = apikey.held_in(secret(web=OLD, web_state=text), "web")
    assert held == Held(OLD, None)
    again = apikey.next_key(resource(rotation=3), held, AT)
    assert again.key == OLD and again.state is not None and again.state.rotation == 3
    assert [item.sha256 for item in apikey.accepted(resource(), held, AT)] == [fingerprint(OLD)]


def test_after_a_rotation_the_old_key_works_for_the_overlap() -> None:
    asked = resource(rotation=1, overlapSeconds=60)
    new = apikey.next_key(asked, Held(OLD, state()), AT)
    assert new.key != OLD
    both = apikey.accepted(asked, new, AT + timedelta(seconds=59))
    assert [item.sha256 for item in both] == [fingerprint(new.key), fingerprint(OLD)]
    assert both[1].until == (AT + timedelta(seconds=60)).timestamp()
    assert len(apikey.accepted(asked, new, AT + timedelta(seconds=60))) == 1
    assert apikey.until_next(asked, new, AT) == 61.0
    assert apikey.until_next(asked, new, AT + timedelta(seconds=60)) == apikey.RECHECK
    status, _ = apikey.observe(asked, new, AT)
    assert (status.rotation, status.previous_until) == (1, "2026-11-30T12:01:00Z")
    at_once = resource(rotation=1, overlapSeconds=0)
    assert len(apikey.accepted(at_once, apikey.next_key(at_once, Held(OLD, state()), AT), AT)) == 1


def test_a_namespace_cannot_fill_the_gateways_with_keys() -> None:
    def raw(number: int) -> dict[str, Any]:
        return {
            "metadata": {
                "name": f"key-{number}",
                "creationTimestamp": f"2026-11-30T12:{number // 60:02d}:{number % 60:02d}Z",
            }
        }

    turns = [apikey.turn_of(raw(number)) for number in range(apikey.MOST_KEYS + 2)]
    refused = [number for number in range(len(turns)) if apikey.too_many(raw(number), turns) is not None]
    assert refused == [apikey.MOST_KEYS, apikey.MOST_KEYS + 1]
    trouble = apikey.too_many(raw(apikey.MOST_KEYS), turns)
    assert trouble is not None and trouble.reason == "TooManyKeys"
    assert apikey.too_many(raw(apikey.MOST_KEYS), turns[1:]) is None  # an older one was deleted


def test_a_grant_names_only_models_of_its_namespace() -> None:
    keys = apikey.accepted(resource(), Held(OLD, state()), AT)
    assert apikey.grant_of(resource(), keys).models is None
    grant = apikey.grant_of(resource(models=["support", "tone"], expiresAt="2026-11-30T13:00:00+01:00"), keys)
    assert grant.models == ["team-a/support", "team-a/tone"] and grant.expires == AT.timestamp()


def test_a_grant_has_the_limits_of_the_key_and_of_its_team() -> None:
    team = claim_of({"metadata": {"name": "shop"}, "spec": {"limits": {"tokensPerMonth": 9, "requestsPerMinute": 5}}})
    asked = resource(limits={"concurrentRequests": 2})
    grant = Grant.read(apikey.grant_of(asked, [], team).json_text())
    assert grant.allowance == Allowance(concurrent_requests=2)
    assert (grant.tenant, grant.tenant_allowance) == ("shop", Allowance(tokens_per_month=9, requests_per_minute=5))
    alone = apikey.grant_of(resource(), [])
    assert (alone.allowance, alone.tenant, alone.tenant_allowance) == (None, None, None)


@pytest.mark.parametrize(
    ("spent", "status", "reason"),
    [
        (0, "True", "AsExpected"),
        (79, "True", "AsExpected"),
        (80, "True", "MonthNearlyUsed"),
        (100, "False", "MonthUsed"),
    ],
)
def test_a_month_that_is_nearly_used_is_told(spent: int, status: str, reason: str) -> None:
    found = apikey.within(100, spent)
    assert (found.status, found.reason) == (status, reason)


def test_the_sums_of_own_keys_are_accepted_and_no_key_is_made() -> None:
    asked = resource(sha256=["a" * 64, "b" * 64])
    assert [item.sha256 for item in apikey.accepted(asked, None, AT)] == ["a" * 64, "b" * 64]
    status, (ready,) = apikey.observe(asked, None, AT)
    assert (ready.reason, status.secret_name, status.fingerprint) == ("HashGiven", None, "b" * 12)


def test_the_status_never_has_a_key() -> None:
    held = Held(OLD, state())
    for asked, made in ((resource(), held), (resource(expiresAt="2026-01-01T00:00:00Z"), held)):
        status, conditions = apikey.observe(asked, made, AT)
        assert OLD not in status.model_dump_json() + "".join(item.message for item in conditions)


def test_an_expired_key_says_so() -> None:
    held = Held(OLD, state())
    asked = resource(expiresAt="2026-11-30T12:00:00Z")
    status, (ready,) = apikey.observe(asked, held, AT)
    assert (status.stage, ready.status, ready.reason) == ("Expired", "False", "Expired")
    status, (ready,) = apikey.observe(asked, held, AT - timedelta(seconds=1))
    assert (status.stage, ready.status) == ("Ready", "True") and "expires at" in ready.message
    assert apikey.until_next(asked, held, AT - timedelta(seconds=5)) == 6.0


def test_trouble_leaves_what_is_known() -> None:
    asked = resource()
    asked.status.fingerprint = "a" * 12
    status, (ready,) = apikey.observe(asked, Trouble("NamespaceNotBound", "m"), AT)
    assert (status.stage, status.fingerprint, ready.reason) == ("Waiting", "a" * 12, "NamespaceNotBound")


@pytest.mark.parametrize(
    "text", ["2026-11-30", "2026-11-30T12:00:00", "2026-02-30T12:00:00Z", "tomorrow", "0001-01-01T00:00:00Z"]
)
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        resource(expiresAt=text)


def test_the_entry_of_the_state_belongs_to_no_other_key() -> None:
    assert STATE.startswith(".")  # the name of an ApiKey has no dot
