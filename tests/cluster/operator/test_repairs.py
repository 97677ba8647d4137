"""Children that are deleted or changed by hand come back within 10 s. Those of serving: test_applied.py."""

import json
from collections.abc import Callable

from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.settled import settled
from worlds.cluster.tenant import Tenant

WITHIN = 10  # seconds. The resync comes after minutes


def body(found: Object | None) -> Object | None:
    """Return what an object says, without what the API server adds."""
    return None if found is None else {key: found.get(key) for key in ("data", "spec") if key in found}


def comes_back(tenant: Tenant, kind: str, namespace: str, name: str, patch: Object) -> None:
    """Delete a child, and then change it. Check both times that it is as before within 10 s."""
    wanted = body(tenant.api.get(kind, namespace, name))
    assert wanted is not None, f"{kind} {name} does not exist"

    def repaired(what: str, act: Callable[[], object]) -> None:
        act()
        tenant.wait(
            lambda: body(tenant.api.get(kind, namespace, name)) == wanted,
            f"{kind} {name} that was {what} is as before",
            WITHIN,
            lambda: json.dumps(body(tenant.api.get(kind, namespace, name))),
        )

    repaired("deleted", lambda: tenant.api.delete(kind, namespace, name))
    repaired("changed", lambda: tenant.api.patch(kind, namespace, name, patch))


def test_the_children_of_a_running_job_come_back(tenant: Tenant) -> None:
    tenant.job("run")
    pod = tenant.running_pod("run")
    settled(tenant)
    comes_back(tenant, "ConfigMap", tenant.name, "run-job", {"data": {"job.json": "{}"}})
    comes_back(tenant, "NetworkPolicy", tenant.name, "run-training", {"spec": {"ingress": [{}]}})
    assert [item["metadata"]["name"] for item in tenant.pods(tenant.get("FineTuneJob", "run"))] == [pod]


def test_the_routes_come_back(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "desk")
    fleet.serve(["support@1.0.0"], engine="transformers")
    fleet.routes()
    settled(tenant)
    found = fleet.find_routes()
    assert found is not None
    comes_back(tenant, "ConfigMap", SYSTEM, found["metadata"]["name"], {"data": {"routes.json": "{}"}})
