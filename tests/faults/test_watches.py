"""What the operator sees late, in another order, or not at all (rows 3 to 7 and 9)."""

import random
import time
from collections.abc import Iterator

import pytest
from testbed.faults import Fault
from testbed.shell import meanwhile
from worlds.cluster.api import Refused
from worlds.cluster.tenant import Tenant
from worlds.faults.apiproxy import Gate, Verdict, Waiting
from worlds.faults.bed import Bed
from worlds.faults.life import Life

SERVED = ("tune", "serve", "roll")


def version_of(bed: Bed) -> str:
    """Return the resourceVersion of the present state."""
    return str(bed.api.call("GET", "/api/v1/namespaces")["metadata"]["resourceVersion"])


@pytest.mark.seconds(25)
def test_a_restarted_operator_that_sees_an_old_state_harms_no_new_job(bed: Bed) -> None:
    """A job is deleted and created again. Then the operator starts with lists in which the first job still exists."""
    life = bed.new_life()
    tenant = life.tenant
    tenant.job("twice")
    tenant.running_pod("twice")
    old = version_of(bed)
    tenant.api.delete("FineTuneJob", tenant.name, "twice")
    tenant.gone("FineTuneJob", "twice")
    tenant.wait(lambda: not tenant.api.list("Pod", tenant.name), "the first pod is deleted")
    tenant.job("twice")
    pod, job = tenant.running_pod("twice"), tenant.get("Job", "twice")["metadata"]["uid"]

    bed.at_api.freeze(old)
    bed.operator.kill9()
    bed.healthy()
    for kind in ("finetunejobs", "jobs", "pods"):
        tenant.wait(lambda kind=kind: bed.at_api.count(frozenset({"list"}), f"list {kind}"), f"it listed {kind}")
    time.sleep(5)  # the operator works on what it sees; there is no sign of the end of that
    bed.at_api.open()
    assert tenant.running_pod("twice") == pod and tenant.get("Job", "twice")["metadata"]["uid"] == job
    # It may have applied the children under the first job's name and owner. It applies them again when it sees the second job.
    bed.silent(life)
    tenant.wait(
        lambda: owners(tenant, "twice-job") == [tenant.get("FineTuneJob", "twice")["metadata"]["uid"]],
        "its file is mended",
    )
    tenant.publish_as_trainer("twice", pod)
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", "twice", "Succeeded", "Published")
    assert [item["metadata"]["uid"] for item in tenant.api.list("Job", tenant.name)] == [job]


def owners(tenant: Tenant, name: str) -> list[str]:
    """Return the UIDs of the owners of a ConfigMap."""
    found = tenant.api.get("ConfigMap", tenant.name, name) or {"metadata": {}}
    return [str(item["uid"]) for item in found["metadata"].get("ownerReferences", [])]


def unobserved(waiting: Waiting) -> Verdict:
    """Show of each object only the last of its states within a second: a deletion and creation looks like a change."""
    if waiting.age < 1:
        return Verdict.HOLD
    return Verdict.DROP if waiting.superseded else Verdict.PASS


def late(waiting: Waiting) -> Verdict:
    """Show everything two seconds later, so that the operator sees its own writes late, too."""
    return Verdict.HOLD if waiting.age < 2 else Verdict.PASS


def repeated(waiting: Waiting) -> Verdict:
    """Show everything twice, the second time after something newer."""
    return Verdict.AGAIN


class Shuffled:
    """A gate that lets some events pass after the next event of their watch."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, waiting: Waiting) -> Verdict:
        # A bookmark promises that no earlier event is missing.
        swapped = waiting.type != "BOOKMARK" and self._random.random() < 0.4
        return Verdict.BEHIND if swapped else Verdict.PASS


@pytest.mark.seconds(35)
@pytest.mark.parametrize("gate", [unobserved, late, repeated], ids=["unobserved", "late", "repeated"])
def test_events_that_are_missing_or_late_or_repeated_change_nothing(bed: Bed, gate: Gate) -> None:
    life = bed.new_life()
    bed.at_api.gate(gate)
    bed.run(life, SERVED)
    bed.silent(life)


@pytest.mark.seconds(190)
def test_events_in_another_order_change_nothing(bed: Bed, seed: random.Random) -> None:
    life = bed.new_life()
    bed.at_api.gate(Shuffled(seed.randint(0, 1 << 30)))
    bed.run(life, SERVED)
    bed.silent(life)


@pytest.mark.seconds(25)
@pytest.mark.parametrize("code", [410, 500])
def test_a_deletion_between_two_watches_is_noticed(bed: Bed, code: int) -> None:
    """The watches end with an ERROR event. Objects are deleted before the operator lists again."""
    life = bed.new_life()
    bed.run(life, ["tune", "serve"])
    tenant = life.tenant
    bed.at_api.gate(lambda waiting: Verdict.HOLD)
    for kind, name in CHILDREN:
        tenant.api.delete(kind, tenant.name, name)
        tenant.gone(kind, name)
    tenant.job("late")
    bed.at_api.end_watches("", code)
    bed.at_api.open()
    tenant.running_pod("late")
    tenant.api.delete("FineTuneJob", tenant.name, "late")
    tenant.gone("FineTuneJob", "late")
    bed.same(life, "serve", 90)
    bed.silent(life)


CHILDREN = [
    ("ConfigMap", "chat-wanted"), ("NetworkPolicy", "chat-serving"), ("Role", "chat-agent"), ("RoleBinding", "chat-agent"),
]  # fmt: skip


@pytest.mark.seconds(240)
def test_watches_that_end_and_lists_that_fail_change_nothing(bed: Bed) -> None:
    life = bed.new_life()
    faults = [
        Fault(match="list ", status=500, code="InternalError", times=5), Fault(match="watch ", status=410, code="Expired", times=5),
        Fault(match="watch ", status=503, code="ServiceUnavailable", times=3),
    ]  # fmt: skip
    bed.at_api.inject(*faults)
    with meanwhile(lambda number: bed.at_api.end_watches("", (410, 500)[number % 2]), every=0.7):
        bed.run(life, SERVED)
    bed.silent(life)


@pytest.fixture
def attentive(bed: Bed) -> Iterator[Bed]:
    """Return an operator that opens a watch again after 6 s without a byte, instead of 100 s."""
    bed.operator.environment["GRAFT_WATCH_SILENCE"] = "6"
    bed.measure_restart()
    yield bed
    del bed.operator.environment["GRAFT_WATCH_SILENCE"]
    bed.operator.clock = 0


@pytest.mark.seconds(45)
@pytest.mark.parametrize("skew", [0.0, 600.0, -600.0], ids=["", "clock ahead", "clock behind"])
def test_half_open_watches_are_noticed(attentive: Bed, skew: float) -> None:
    """The connections of all watches stay open, and no byte comes any more."""
    bed = attentive
    bed.operator.clock = skew
    bed.measure_restart()
    life = bed.new_life()
    bed.run(life, ["tune"])
    bed.run(life, ["serve", "roll"], lambda phase: bed.at_api.half_open())
    bed.silent(life)


@pytest.mark.seconds(130)
@pytest.mark.timeout(900)
def test_half_open_watches_are_noticed_with_the_release_s_limit(bed: Bed) -> None:
    life = bed.new_life()
    life.patience = 200
    bed.run(life, ["tune"])
    bed.at_api.half_open()
    bed.run(life, ["serve"])
    bed.silent(life)


@pytest.mark.seconds(35)
def test_a_second_writer_causes_no_more_than_conflicts(bed: Bed) -> None:
    """Somebody writes an annotation to every resource all the time, so that resourceVersions are always outdated."""
    life = bed.new_life()
    tenant = life.tenant

    def write(number: int) -> None:
        annotate(life, str(number))

    with meanwhile(write, every=0.05):
        for phase in SERVED:
            life.phases()[phase]()
    annotate(life, None)
    bed.same(life, "roll")
    bed.silent(life)
    assert len(tenant.api.list("Job", tenant.name)) == 3


def annotate(life: Life, value: str | None) -> None:
    api, namespace = life.tenant.api, life.tenant.name
    for kind in ("FineTuneJob", "Adapter", "AdapterDeployment", "Job", "Deployment"):
        for item in api.list(kind, namespace):
            patch = {"metadata": {"annotations": {"example.com/writer": value}}}
            try:
                api.patch(kind, namespace, item["metadata"]["name"], patch)
            except Refused as error:
                assert error.status in {404, 409}
