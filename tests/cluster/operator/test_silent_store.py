"""While the store accepts connections and answers none, the operator does everything that needs no store."""

from testbed.objectstore import S3Server
from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant


def test_a_silent_store_delays_neither_routes_nor_the_jobs_of_others(
    tenant: Tenant, calm: Tenant, s3: S3Server
) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    (pod,) = fleet.serve(["support@1.0.0"])
    for number in range(20):  # the operator reads the progress of each one every few seconds
        tenant.job(f"running-{number}", f"other-{number}")
    for number in range(20):
        tenant.running_pod(f"running-{number}")
    calm.job("first", output={"adapter": "support", "version": "1.0.0"})
    calm.running_pod("first")

    def backends() -> int:
        return len(fleet.routes().backends)

    assert backends() == 1
    with s3.silent():
        tenant.job("waiting", "new")
        tenant.until("FineTuneJob", "waiting", "Accepted", "StorageUnavailable")
        fleet.ready(pod, ready=False)
        tenant.wait(lambda: backends() == 0, "the pod leaves the routes while the store is silent", 10)
        fleet.ready(pod, ready=True)
        tenant.wait(lambda: backends() == 1, "the pod is back while the store is silent", 10)
        # A job that names its version needs no listing of the stored versions.
        calm.job("second", output={"adapter": "support", "version": "2.0.0"})
        calm.running_pod("second")
    tenant.running_pod("waiting")
