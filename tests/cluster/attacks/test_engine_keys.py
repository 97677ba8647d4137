"""The keys of engines on a real API server: who may read them, what pods get of them, and what a deletion or an upgrade does."""

import base64
from collections.abc import Iterator

import pytest
from graft.contracts.enginekeys import GATEWAY_KEYS, deployment_key, fingerprint, new_key, root_keys
from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import SYSTEM, OperatorProcess
from worlds.cluster.tenant import Tenant


def secret(api: Api) -> Object | None:
    return api.get("Secret", SYSTEM, GATEWAY_KEYS)


def hashes(tenant: Tenant, uid: str) -> list[str]:
    found = secret(tenant.api)
    assert found is not None
    return [fingerprint(deployment_key(root, uid)) for root in root_keys(found["data"]).values()]


def until_accepted(tenant: Tenant, fleet: Fleet, keys: list[str] | None) -> None:
    tenant.wait(lambda: fleet.wanted().gateway_keys == keys, f"the engines accept {keys}", 90)


@pytest.fixture
def old_gateway(api: Api) -> Iterator[Object]:
    """A pod of a gateway of an earlier release, which sends no key."""
    metadata = {"name": "graft-gateway-old", "namespace": SYSTEM, "labels": {"app.kubernetes.io/component": "gateway"}}
    spec = {"containers": [{"name": "gateway", "image": "graft/agent:old"}], "nodeSelector": {"no-such-node": "x"}}
    yield api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    if api.get("Pod", SYSTEM, "graft-gateway-old"):
        api.delete("Pod", SYSTEM, "graft-gateway-old")


def test_engines_know_sums_of_keys_that_only_the_gateway_may_read(tenant: Tenant, operator: OperatorProcess) -> None:
    """Read the keys as an agent, as the tenant, or from what pods mount -> refused; engines get SHA-256 sums only"""
    fleet = Fleet(tenant, "keys")
    tenant.trained("keys")
    (pod,) = fleet.serve(["support@latest"])
    uid = tenant.get("AdapterDeployment", "keys")["metadata"]["uid"]
    assert fleet.wanted().gateway_keys == hashes(tenant, uid)
    assert fleet.routes().uid == uid
    assert tenant.api.as_token(tenant.api.token(SYSTEM, "graft-gateway")).get("Secret", SYSTEM, GATEWAY_KEYS)
    for account, place in (("keys-agent", tenant.name), ("default", tenant.name), ("default", SYSTEM)):
        with pytest.raises(Refused) as refused:
            tenant.api.as_token(tenant.api.token(place, account)).get("Secret", SYSTEM, GATEWAY_KEYS)
        assert refused.value.status == 403
    gateway = tenant.api.as_token(tenant.api.token(SYSTEM, "graft-gateway"))
    for place in (SYSTEM, tenant.name):
        with pytest.raises(Refused):
            gateway.list("Secret", place)
    found = secret(tenant.api)
    assert found is not None
    (root,) = root_keys(found["data"]).values()
    everything = str(pod) + str(fleet.find_routes()) + str(tenant.get("ConfigMap", "keys-wanted"))
    for key in (root.decode(), deployment_key(root, uid)):
        assert key not in everything and key not in operator.log.read_text()
    (engine,) = pod["spec"]["containers"]
    (mount,) = [item for item in engine["volumeMounts"] if item["name"] == "access"]
    assert mount["readOnly"] is True and not [item for item in engine["volumeMounts"] if item["name"] == "storage"]


def test_a_deleted_secret_comes_back_with_the_same_keys(tenant: Tenant) -> None:
    """Delete the Secret with the gateways' keys -> the operator creates it again, and no engine refuses a gateway"""
    before = secret(tenant.api)
    assert before is not None
    tenant.api.delete("Secret", SYSTEM, GATEWAY_KEYS)
    tenant.wait(lambda: secret(tenant.api) is not None, "the Secret exists again")
    after = secret(tenant.api)
    assert (
        after is not None and after["data"] == before["data"] and after["metadata"]["uid"] != before["metadata"]["uid"]
    )


def test_keys_are_rotated_without_new_pods(tenant: Tenant) -> None:
    """Add a root key, then remove the old one -> the running engines accept both, then the new one only"""
    fleet = Fleet(tenant, "rotated")
    tenant.trained("rotated")
    (pod,) = fleet.serve(["support@latest"])
    uid = tenant.get("AdapterDeployment", "rotated")["metadata"]["uid"]
    before = secret(tenant.api)
    assert before is not None
    (old,) = before["data"]
    entry = {"2999-01-01.key": base64.b64encode(new_key().encode()).decode()}
    tenant.api.patch("Secret", SYSTEM, GATEWAY_KEYS, {"data": entry})
    both = hashes(tenant, uid)
    assert len(both) == 2
    until_accepted(tenant, fleet, both)
    tenant.api.patch("Secret", SYSTEM, GATEWAY_KEYS, {"data": {old: None}})
    until_accepted(tenant, fleet, both[1:])
    assert [item["metadata"]["name"] for item in fleet.pods(1)] == [pod["metadata"]["name"]]


def test_an_upgrade_asks_for_keys_once_every_gateway_sends_them(tenant: Tenant, old_gateway: Object) -> None:
    """Keep a gateway of an earlier release running -> its requests are answered; engines ask for keys when it has ended"""
    fleet = Fleet(tenant, "upgraded")
    tenant.trained("upgraded")
    fleet.deploy(["support@latest"])
    tenant.wait(fleet.told, "the wanted ConfigMap exists")
    uid = tenant.get("AdapterDeployment", "upgraded")["metadata"]["uid"]
    assert fleet.wanted().gateway_keys is None
    tenant.api.delete("Pod", SYSTEM, "graft-gateway-old")
    until_accepted(tenant, fleet, hashes(tenant, uid))
