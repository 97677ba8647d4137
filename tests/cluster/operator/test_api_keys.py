"""API keys from the resource to the gateway: who gets the key, who is answered, and how fast that ends."""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from graft.artifacts.store import S3Store
from graft.contracts.apikeys import API_KEYS_SECRET, KEY, new_api_key
from graft.contracts.enginekeys import fingerprint
from worlds.cluster.api import Api, Refused
from worlds.cluster.front_door import FrontDoor, ask_for, front_door, key_of
from worlds.cluster.operator_process import SYSTEM, OperatorProcess
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import bind, new_tenant

IN_FORCE = 5.0  # seconds in which a change must reach the gateways


@contextmanager
def two_gateways(api: Api) -> Iterator[list[FrontDoor]]:
    with (
        front_door(api, "keys-1", authentication="keys") as one,
        front_door(api, "keys-2", authentication="keys") as two,
    ):
        yield [one, two]


def everywhere(doors: list[FrontDoor], key: str, expected: object) -> None:
    """Wait until all gateways answer a key in one way, for at most IN_FORCE seconds."""
    end = time.monotonic() + IN_FORCE
    while (found := [door.models(key) for door in doors]) != [expected] * len(doors):
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_a_key_lives_from_its_creation_to_its_revocation(tenant: Tenant, running: OperatorProcess) -> None:
    with two_gateways(tenant.api) as doors:
        assert [door.models(None) for door in doors] == [401, 401]
        ask_for(tenant, "web", description="the web shop")
        tenant.until("ApiKey", "web", "Ready", "Issued")
        first = key_of(tenant, "web")
        assert KEY.fullmatch(first)
        everywhere(doors, first, [])
        assert doors[0].ask(f"{tenant.name}/support", first).status == 404  # there is no deployment

        # The key is in its Secret, and nowhere else.
        status = tenant.status("ApiKey", "web")
        assert status["fingerprint"] == fingerprint(first)[:12] and status["secretName"] == API_KEYS_SECRET
        for place in (tenant.name, SYSTEM):
            assert first not in str(tenant.api.list("ConfigMap", place)) + str(tenant.api.list("CoreEvent", place))
        assert first not in str(tenant.get("ApiKey", "web")) and first not in running.log.read_text()

        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"rotation": 1, "overlapSeconds": 3600}})
        tenant.wait(lambda: tenant.status("ApiKey", "web").get("rotation") == 1, "the key is rotated")
        second = key_of(tenant, "web")
        assert second != first
        for key in (first, second):  # the overlap
            everywhere(doors, key, [])

        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"rotation": 2, "overlapSeconds": 0}})
        tenant.wait(lambda: tenant.status("ApiKey", "web").get("rotation") == 2, "the key is rotated again")
        third = key_of(tenant, "web")
        everywhere(doors, third, [])
        for key in (first, second):
            everywhere(doors, key, 401)

        past = "2026-01-01T00:00:00Z"
        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"expiresAt": past}})
        everywhere(doors, third, 401)
        tenant.until("ApiKey", "web", "Ready", "Expired")
        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"expiresAt": None}})
        everywhere(doors, third, [])

        tenant.api.delete("ApiKey", tenant.name, "web")
        everywhere(doors, third, 401)
        tenant.gone("ApiKey", "web")
        assert tenant.api.get("Secret", tenant.name, API_KEYS_SECRET) is None


def test_keys_of_one_namespace_share_its_secret_and_do_not_touch_each_other(tenant: Tenant) -> None:
    for name in ("web", "batch"):
        ask_for(tenant, name)
        tenant.until("ApiKey", name, "Ready", "Issued")
    web, batch = key_of(tenant, "web"), key_of(tenant, "batch")
    tenant.api.delete("ApiKey", tenant.name, "web")
    tenant.gone("ApiKey", "web")
    assert web != batch == key_of(tenant, "batch")
    with front_door(tenant.api, "keys-3", authentication="keys") as door:
        assert (door.models(batch), door.models(web)) == ([], 401)


def test_a_removed_key_is_revoked_and_a_new_one_is_made(tenant: Tenant) -> None:
    with two_gateways(tenant.api) as doors:
        ask_for(tenant, "web")
        tenant.until("ApiKey", "web", "Ready", "Issued")
        before = key_of(tenant, "web")
        everywhere(doors, before, [])
        weak = base64.b64encode(b"password").decode()
        tenant.api.patch("Secret", tenant.name, API_KEYS_SECRET, {"data": {"web": weak}})
        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"description": "look again"}})
        tenant.wait(lambda: KEY.fullmatch(key_of(tenant, "web")), "the key of another form is replaced")
        everywhere(doors, before, 401)
        everywhere(doors, key_of(tenant, "web"), [])
        everywhere(doors, "password", 401)


def test_a_sum_is_enough(tenant: Tenant) -> None:
    own = new_api_key()
    with two_gateways(tenant.api) as doors:
        ask_for(tenant, "web", sha256=[fingerprint(own)])
        everywhere(doors, own, [])
        tenant.until("ApiKey", "web", "Ready", "HashGiven")
        assert tenant.api.get("Secret", tenant.name, API_KEYS_SECRET) is None
        tenant.api.patch("ApiKey", tenant.name, "web", {"spec": {"sha256": ["0" * 64]}})
        everywhere(doors, own, 401)


def test_a_forced_deletion_revokes_the_key_too(tenant: Tenant) -> None:
    with two_gateways(tenant.api) as doors:
        ask_for(tenant, "web")
        tenant.until("ApiKey", "web", "Ready", "Issued")
        key = key_of(tenant, "web")
        everywhere(doors, key, [])
        tenant.api.patch("ApiKey", tenant.name, "web", {"metadata": {"finalizers": None}})
        tenant.api.delete("ApiKey", tenant.name, "web")
        everywhere(doors, key, 401)


def test_a_grant_that_was_changed_by_hand_comes_back(tenant: Tenant) -> None:
    ask_for(tenant, "web", models=["support"])
    tenant.until("ApiKey", "web", "Ready", "Issued")

    def grants() -> list[dict[str, Any]]:
        found = tenant.api.list("ConfigMap", SYSTEM)
        return [
            item for item in found if (item["metadata"].get("labels") or {}).get("graft.dev/namespace") == tenant.name
        ]

    (before,) = grants()
    name = before["metadata"]["name"]
    tenant.api.patch("ConfigMap", SYSTEM, name, {"data": {"grant.json": "{}"}})
    tenant.wait(lambda: [item["data"] for item in grants()] == [before["data"]], "the grant is as before", 10)
    tenant.api.delete("ConfigMap", SYSTEM, name)
    tenant.wait(lambda: [item["data"] for item in grants()] == [before["data"]], "the grant is back", 10)


def test_a_secret_of_somebody_else_is_not_touched(tenant: Tenant) -> None:
    manifest = {"apiVersion": "v1", "kind": "Secret", "stringData": {"web": "mine"}}
    tenant.api.create(manifest | {"metadata": {"name": API_KEYS_SECRET, "namespace": tenant.name}})
    ask_for(tenant, "web")
    tenant.until("ApiKey", "web", "Ready", "SecretTaken")
    tenant.api.delete("ApiKey", tenant.name, "web")
    tenant.gone("ApiKey", "web")
    assert key_of(tenant, "web") == "mine"


def test_a_namespace_that_is_not_bound_says_how_to_bind_it(
    api: Api, store: S3Store, request: pytest.FixtureRequest, running: OperatorProcess
) -> None:
    tenant = new_tenant(api, store, request)
    ask_for(tenant, "web")
    assert "create rolebinding" in tenant.until("ApiKey", "web", "Ready", "NamespaceNotBound")["message"]
    bind(tenant)
    tenant.until("ApiKey", "web", "Ready", "Issued")


REFUSED = {
    "another namespace's model": {"models": ["team-b/support"]},
    "no time": {"expiresAt": "tomorrow"},
    "a time without a zone": {"expiresAt": "2027-01-01T00:00:00"},
    "a day that does not exist": {"expiresAt": "2027-02-30T00:00:00Z"},
    "no sum": {"sha256": ["password"]},
    "a sum and a rotation": {"sha256": ["0" * 64], "rotation": 1},
    "a negative overlap": {"overlapSeconds": -1},
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_api_server_refuses(tenant: Tenant, what: str) -> None:
    with pytest.raises(Refused) as error:
        ask_for(tenant, "web", **REFUSED[what])
    assert error.value.status == 422
