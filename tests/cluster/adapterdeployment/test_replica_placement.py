"""Placement of adapters on some of the replicas, when not all adapters fit on each replica.

Each adapter gets two replicas, lost copies are replaced, and messages name the fields to raise.
"""

import pytest
from worlds.cluster.api import Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant

NAMES = ("red", "green", "blue", "grey")


def homes(fleet: Fleet) -> dict[str, set[str]]:
    """Return the pods that must have each adapter: adapter -> pods."""
    return {item.adapter: set(item.pods or []) for item in fleet.wanted().adapters}


def name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def load(fleet: Fleet, pods: list[Object]) -> None:
    """Report, as the agent of each pod, that all adapters of the pod are loaded."""
    for pod in pods:
        mine = fleet.wanted().for_pod(name(pod))
        assert mine is not None
        fleet.agent_says(pod, {item.adapter: "Loaded" for item in mine.adapters})


def known(fleet: Fleet, pods: list[Object]) -> None:
    """Wait until the assignment covers exactly these pods."""
    expected = sorted(name(pod) for pod in pods)
    fleet.tenant.wait(lambda: fleet.wanted().assigned == expected, f"the assignment covers {expected}")


def trained(tenant: Tenant, *names: str) -> list[str]:
    for each in names:
        tenant.trained(f"job-{each}", adapter=each)
    return [f"{each}@latest" for each in names]


def serve(tenant: Tenant, adapters: list[str], replicas: int, slots: int) -> tuple[Fleet, list[Object]]:
    """Deploy, and play the agents until every adapter that fits is loaded. Return the deployment and its pods."""
    fleet = Fleet(tenant, "chat")
    fleet.deploy(adapters, replicas=replicas, limits={"adaptersPerReplica": slots})
    pods = fleet.pods(replicas)
    tenant.wait(lambda: len(fleet.wanted_names()) == len(adapters), f"{len(adapters)} adapters are wanted")
    if len(adapters) > slots:
        known(fleet, pods)
    load(fleet, pods)
    fleet.until("Progressing", "Complete")
    return fleet, pods


def test_losing_a_replica_loses_no_adapter(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, *NAMES), replicas=3, slots=3)
    before = homes(fleet)
    assert all(len(where) >= 2 for where in before.values())
    fleet.until("Degraded", "AsExpected")
    status = fleet.status()
    assert (status["adaptersText"], status["stage"]) == ("4/4", "Available")
    shown = status["replicaStatus"][0]["adapters"][0]
    assert (shown["version"], len(shown["digest"]), shown["state"]) == ("1.0.0", 12, "Loaded")

    lost = name(pods[0])
    tenant.api.delete("Pod", tenant.name, lost)
    tenant.gone("Pod", lost)
    now = fleet.pods(3)
    known(fleet, now)
    after = homes(fleet)
    for adapter, where in before.items():
        assert where - {lost} <= after[adapter], "adapters must stay on the remaining replicas"
        assert len(after[adapter]) >= 2
    assert fleet.until("Available", "Serving")["status"] == "True"  # every adapter had a second replica
    load(fleet, now)
    fleet.until("Progressing", "Complete")
    tenant.wait(
        lambda: {len(item.loaded) for item in fleet.routes().backends} == {4},
        "each replica has three adapters and the base model",
    )


def test_a_replica_that_becomes_unready_degrades_the_deployment(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, "red", "green"), replicas=2, slots=2)
    fleet.until("Degraded", "AsExpected")
    fleet.ready(pods[0], False)
    degraded = fleet.until("Degraded", "ReplicaUnavailable", says="1 of 2 replicas are ready")
    assert degraded["status"] == "True"
    assert fleet.until("Available", "Serving") and fleet.status()["stage"] == "Degraded"
    fleet.ready(pods[0], True)
    fleet.until("Degraded", "AsExpected")
    tenant.wait(
        lambda: fleet.status()["stage"] == "Available",
        "the stage is Available again",
        explain=lambda: str(fleet.status()),
    )


def test_no_room_names_the_fields_to_raise_and_raising_one_helps(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, *NAMES), replicas=2, slots=3)
    told = fleet.until("Degraded", "NoRoom", says="is on 1 replica instead of 2")
    assert told["status"] == "True"
    assert "raise spec.replicas to 3, or raise spec.limits.adaptersPerReplica to 4" in told["message"]
    assert fleet.until("Available", "Serving")  # each adapter is on one replica at least

    fleet.change(replicas=3)
    now = fleet.pods(3)
    known(fleet, now)
    load(fleet, now)
    fleet.until("Degraded", "AsExpected")
    assert all(len(where) >= 2 for where in homes(fleet).values())

    fleet.change(replicas=1)
    (left,) = fleet.pods(1)
    known(fleet, [left])
    load(fleet, [left])
    remedy = "raise spec.replicas to 3, or raise spec.limits.adaptersPerReplica to 4"
    fleet.until("Degraded", "NoRoom", says=f"has no room on 1 replica: {remedy}")
    fleet.until("Available", "RouteUnavailable")
    fleet.change(limits={"adaptersPerReplica": 4})
    tenant.wait(lambda: fleet.wanted().assigned is None, "every adapter is on every replica")
    load(fleet, [left])
    fleet.until("Degraded", "AsExpected")
    assert len(fleet.pods(1)) == 1 and pods


def test_a_new_version_rolls_out_on_some_of_the_replicas(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, "red", "green", "blue"), replicas=3, slots=3)
    assert fleet.wanted().assigned is None  # the three adapters fit; with a new version beside an old one they do not
    tenant.trained("again", adapter="red")
    fleet.until_wanted("red-1.0.0", "red-1.0.1", "green-1.0.0", "blue-1.0.0")
    known(fleet, pods)
    where = homes(fleet)
    assert len(where["red-1.0.1"]) == 2
    first, second = (pod for pod in pods if name(pod) in where["red-1.0.1"])
    load(fleet, [first])
    tenant.wait(
        lambda: "1/2" in [item.get("loaded") for item in fleet.status()["adapters"]],
        "one of two replicas has the new version",
    )
    assert fleet.targets()["red"] == "red-1.0.0"
    assert fleet.until("Available", "Serving")

    load(fleet, [second])
    fleet.until_targets(red="red-1.0.1", green="green-1.0.0", blue="blue-1.0.0")
    fleet.until_wanted("red-1.0.1", "green-1.0.0", "blue-1.0.0")
    tenant.wait(lambda: fleet.wanted().assigned is None, "all adapters fit on each replica again")
    load(fleet, pods)
    fleet.until("Progressing", "Complete")
    fleet.until("Degraded", "AsExpected")


def test_an_invalid_limit_is_refused(tenant: Tenant) -> None:
    for limits, words in (
        ({"adapterBytesPerReplica": "-4Gi"}, "at least 1Mi"),
        ({"adapterBytesPerReplica": "10m"}, "at least 1Mi"),
        ({"adaptersPerReplica": 0}, "should be greater than or equal to 1"),
    ):
        with pytest.raises(Refused, match=words):
            Fleet(tenant, "chat").deploy(["red@latest"], limits=limits)
