"""Adapters on a part of the replicas, because not all fit on each: two copies, what is lost comes back, room is asked for by name."""

import pytest
from worlds.cluster.api import Object, Refused
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant

NAMES = ("red", "green", "blue", "grey")


def homes(fleet: Fleet) -> dict[str, set[str]]:
    """Adapter -> the pods that are to have it."""
    return {item.adapter: set(item.pods or []) for item in fleet.wanted().adapters}


def name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def load(fleet: Fleet, pods: list[Object]) -> None:
    """Each agent does what it is told."""
    for pod in pods:
        mine = fleet.wanted().for_pod(name(pod))
        assert mine is not None
        fleet.agent_says(pod, {item.adapter: "Loaded" for item in mine.adapters})


def known(fleet: Fleet, pods: list[Object]) -> None:
    """Wait until the assignment knows exactly these pods."""
    expected = sorted(name(pod) for pod in pods)
    fleet.tenant.wait(lambda: fleet.wanted().assigned == expected, f"the assignment is for {expected}")


def trained(tenant: Tenant, *names: str) -> list[str]:
    for each in names:
        tenant.trained(f"job-{each}", adapter=each)
    return [f"{each}@latest" for each in names]


def serve(tenant: Tenant, adapters: list[str], replicas: int, slots: int) -> tuple[Fleet, list[Object]]:
    """Deploy, and play the agents until everything that has room is loaded."""
    fleet = Fleet(tenant, "chat")
    fleet.deploy(adapters, replicas=replicas, limits={"adaptersPerReplica": slots})
    pods = fleet.pods(replicas)
    tenant.wait(lambda: len(fleet.wanted_names()) == len(adapters), f"{len(adapters)} adapters are wanted")
    if len(adapters) > slots:
        known(fleet, pods)
    load(fleet, pods)
    fleet.until("Progressing", "Complete")
    return fleet, pods


def test_a_replica_that_goes_takes_no_adapter_with_it(tenant: Tenant) -> None:
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
        assert where - {lost} <= after[adapter], "what was somewhere stays there"
        assert len(after[adapter]) >= 2
    assert fleet.until("Available", "Serving")["status"] == "True"  # every adapter had a second replica
    load(fleet, now)
    fleet.until("Progressing", "Complete")
    tenant.wait(
        lambda: {len(item.loaded) for item in fleet.routes().backends} == {4}, "three adapters and the base each"
    )


def test_a_replica_that_is_not_ready_any_more_is_told(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, "red", "green"), replicas=2, slots=2)
    fleet.until("Degraded", "AsExpected")
    fleet.ready(pods[0], False)
    degraded = fleet.until("Degraded", "ReplicaUnavailable", says="1 of 2 replicas are ready")
    assert degraded["status"] == "True"
    assert fleet.until("Available", "Serving") and fleet.status()["stage"] == "Degraded"
    fleet.ready(pods[0], True)
    fleet.until("Degraded", "AsExpected")
    tenant.wait(
        lambda: fleet.status()["stage"] == "Available", "it is whole again", explain=lambda: str(fleet.status())
    )


def test_no_room_says_what_would_make_room_and_that_does(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, *NAMES), replicas=2, slots=3)
    told = fleet.until("Degraded", "NoRoom", says="is on 1 replica instead of 2")
    assert told["status"] == "True"
    assert "raise spec.replicas to 3, or raise spec.limits.adaptersPerReplica to 4" in told["message"]
    assert fleet.until("Available", "Serving")  # each of them has one

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
    tenant.wait(lambda: fleet.wanted().assigned is None, "everything is for every replica")
    load(fleet, [left])
    fleet.until("Degraded", "AsExpected")
    assert len(fleet.pods(1)) == 1 and pods


def test_a_version_changes_on_a_part_of_the_replicas(tenant: Tenant) -> None:
    fleet, pods = serve(tenant, trained(tenant, "red", "green", "blue"), replicas=3, slots=3)
    assert fleet.wanted().assigned is None  # all fit; beside an older version they do not
    tenant.trained("again", adapter="red")
    fleet.until_wanted("red-1.0.0", "red-1.0.1", "green-1.0.0", "blue-1.0.0")
    known(fleet, pods)
    where = homes(fleet)
    assert len(where["red-1.0.1"]) == 2
    first, second = (pod for pod in pods if name(pod) in where["red-1.0.1"])
    load(fleet, [first])
    tenant.wait(lambda: "1/2" in [item.get("loaded") for item in fleet.status()["adapters"]], "one of two has it")
    assert fleet.targets()["red"] == "red-1.0.0"
    assert fleet.until("Available", "Serving")

    load(fleet, [second])
    fleet.until_targets(red="red-1.0.1", green="green-1.0.0", blue="blue-1.0.0")
    fleet.until_wanted("red-1.0.1", "green-1.0.0", "blue-1.0.0")
    tenant.wait(lambda: fleet.wanted().assigned is None, "all fit again")
    load(fleet, pods)
    fleet.until("Progressing", "Complete")
    fleet.until("Degraded", "AsExpected")


def test_a_limit_that_makes_no_sense_is_refused(tenant: Tenant) -> None:
    for limits, words in (
        ({"adapterBytesPerReplica": "-4Gi"}, "at least 1Mi"),
        ({"adapterBytesPerReplica": "10m"}, "at least 1Mi"),
        ({"adaptersPerReplica": 0}, "should be greater than or equal to 1"),
    ):
        with pytest.raises(Refused, match=words):
            Fleet(tenant, "chat").deploy(["red@latest"], limits=limits)
