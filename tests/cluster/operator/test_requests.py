"""How many requests the life of a job costs. Requests are counted, not seconds, so the load of the machine does not matter."""

from graft.api.meta import Condition
from graft.kube import Kube
from graft.reconcile.shared.news import News, Transition, transitions
from graft.status import now
from kubernetes.aio import config
from testbed.controlplane import ControlPlane
from worlds.cluster.api import Object
from worlds.cluster.audit import Request, of_operator
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.settled import settled
from worlds.cluster.tenant import Tenant

# docs/design/2026-11-30-writes-of-a-life.md names them: 9 objects and statuses, and 3 Events.
MINIMUM = 12
DENIED = Condition(type="Succeeded", status="False", reason="StorageDenied", message="m", last_transition_time="")


def test_a_life_makes_few_writes_and_a_finished_job_none(tenant: Tenant, plane: ControlPlane) -> None:
    tenant.trained("before")  # the namespace has its storage key now

    def since(mark: int) -> list[Request]:
        return of_operator(plane.audit_log, tenant.name)[mark:]

    settled(tenant)
    begin = len(since(0))
    tenant.job("first", "support")
    pod = tenant.running_pod("first")
    tenant.until("FineTuneJob", "first", "Succeeded", "Training")  # a person sees each stage of a life
    tenant.publish_as_trainer("first", pod, 8)
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", "first", "Succeeded", "Published")
    tenant.until_events("first", "Training", "Published")
    settled(tenant)
    made = since(begin)
    writes = [str(item) for item in made if item.mutates]
    assert len(writes) <= 1.25 * MINIMUM, "\n".join(map(str, made))
    assert len(writes) >= MINIMUM, "the audit log must have the operator's writes"
    assert not [item for item in made if item.mutates and item.status >= 400]

    # A finished job costs nothing, even if it is changed.
    mark = len(since(0))
    tenant.api.patch("FineTuneJob", tenant.name, "first", {"metadata": {"annotations": {"seen": "yes"}}})
    settled(tenant)
    assert not since(mark)


async def test_repetitions_are_counted_in_the_series_of_one_event(tenant: Tenant, running: OperatorProcess) -> None:
    """With the operator's own rights. The API server accepts the series, and refuses the same transition again."""
    job = tenant.api.create(tenant.job_manifest("flapping", suspend=True))
    kube = Kube(await config.new_client_from_config(config_file=str(running.kubeconfig)))
    try:
        news = News(kube)
        for version in (1, 1, 2, 3, 4, 5):
            await news.report(_denied(job, version))
        await News(kube).report(_denied(job, 1))  # an operator that has restarted
    finally:
        await kube.close()
    (event,) = [item for item in tenant.api.list("CoreEvent", tenant.name) if item["reason"] == "StorageDenied"]
    assert event["series"]["count"] == 4  # of 5: the count is written when it has doubled


def _denied(job: Object, version: int) -> list[Transition]:
    raw = {**job, "metadata": job["metadata"] | {"resourceVersion": str(version)}}
    return transitions(raw, [], [DENIED], now())
