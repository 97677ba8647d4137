"""How many requests the life of a job costs. Requests are counted, not seconds, so the load of the machine does not matter."""

from testbed.controlplane import ControlPlane
from worlds.cluster.requests import Request, of_operator
from worlds.cluster.settled import settled
from worlds.cluster.tenant import Tenant

# docs/design/2026-11-30-writes-of-a-life.md names them: 9 objects and statuses, and 3 Events.
MINIMUM = 12


def test_a_life_makes_few_writes_and_a_finished_job_none(tenant: Tenant, plane: ControlPlane) -> None:
    tenant.trained("before")  # the namespace has its storage key now

    def since(mark: int) -> list[Request]:
        return of_operator(plane.audit_log, tenant.name)[mark:]

    settled(tenant)
    begin = len(since(0))
    tenant.trained("first")
    tenant.until_events("first", "Training", "Published")
    settled(tenant)
    made = since(begin)
    writes = [str(item) for item in made if item.mutates]
    assert len(writes) <= 1.25 * MINIMUM, "\n".join(map(str, made))
    assert len(writes) >= MINIMUM, "the audit log must have the operator's writes"
    assert not [item for item in made if item.mutates and item.status >= 400]

    # A change of a finished job is read, and nothing else.
    mark = len(since(0))
    tenant.api.patch("FineTuneJob", tenant.name, "first", {"metadata": {"annotations": {"seen": "yes"}}})
    tenant.wait(lambda: since(mark), "the operator reconciles the job")
    settled(tenant)
    assert {str(item) for item in since(mark)} == {"get finetunejobs first -> 200"}
