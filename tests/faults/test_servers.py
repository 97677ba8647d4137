"""The API server and the store refuse, hang, are slow, or are gone (rows 8 and 14)."""

import time

import pytest
from testbed.faults import EXPIRED_TOKEN, SLOW_DOWN, Fault
from testbed.shell import wait_for
from worlds.faults.bed import Bed

BUSY = Fault(match="apply ", status=429, code="TooManyRequests", retry_after=1, times=10)
SERVED = ("tune", "serve", "roll")


@pytest.mark.seconds(40)
def test_an_api_server_that_is_busy_is_asked_again_later(bed: Bed) -> None:
    """Writes get 429 with Retry-After, then reads get 503."""
    life = bed.new_life()
    unavailable = Fault(match="get ", status=503, code="ServiceUnavailable", times=10)
    bed.run(life, SERVED, lambda phase: bed.at_api.inject(BUSY, unavailable))
    bed.silent(life)


@pytest.mark.seconds(60)
def test_requests_that_hang_are_sent_again(bed: Bed) -> None:
    life = bed.new_life()
    matches = ("apply jobs", "create jobs", "apply finetunejobs/status", "apply configmaps", "apply adapterdeployments")
    bed.at_api.inject(*(Fault(match=match, hang_at=0, times=1) for match in matches))
    bed.run(life, ["tune", "serve"])
    bed.silent(life)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(10, marks=pytest.mark.seconds(150)), pytest.param(300, marks=pytest.mark.seconds(400))],
)
@pytest.mark.parametrize("killed", [False, True], ids=["hanging", "killed"])
@pytest.mark.timeout(1200)
def test_the_operator_survives_an_outage_of_the_api_server(bed: Bed, killed: bool, seconds: int) -> None:
    """The API server is gone in the middle of a run, and the operator continues by itself."""
    life = bed.new_life()
    life.patience = 180

    def outage(step: str) -> None:
        if step in {"created", "deployed"}:
            with bed.stopped_api(killed=killed):
                time.sleep(seconds if step == "created" else 10)

    life.at = outage
    bed.run(life, ["tune", "serve"])
    bed.silent(life)
    assert bed.operator.process is not None and bed.operator.process.poll() is None, "the operator was not restarted"


@pytest.mark.seconds(65)
def test_an_operator_that_has_just_started_survives_a_long_outage(bed: Bed) -> None:
    """kopf's own request at the start fails for so long that kopf by default gives up, and ends the process."""
    bed.operator.kill9()
    before = bed.at_api.count(frozenset({"list"}), "admissionregistration")
    bed.at_api.inject(Fault(match="admissionregistration", status=503, code="ServiceUnavailable", times=10))
    bed.healthy()
    life = bed.new_life()
    bed.run(life, ["tune"])  # the operator works meanwhile
    process = bed.operator.process
    assert process is not None

    def asked() -> bool:
        assert process.poll() is None, "the operator has ended"
        return bed.at_api.count(frozenset({"list"}), "admissionregistration") - before > 10

    wait_for(asked, 120, "the request has succeeded in the end")
    bed.silent(life)


AWAY = {"hanging": Fault(hang_at=0), "refusing": Fault(status=503, code="ServiceUnavailable")}


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(10, marks=pytest.mark.seconds(60)), pytest.param(300, marks=pytest.mark.seconds(400))],
)
@pytest.mark.parametrize("how", AWAY)
@pytest.mark.timeout(1200)
def test_the_operator_survives_an_outage_of_the_store(bed: Bed, how: str, seconds: int) -> None:
    """The store is gone before a job has its credentials, and again when its training is complete."""
    life = bed.new_life()
    life.patience = 180

    def outage(step: str) -> None:
        if step in {"created", "published"}:
            bed.at_store.inject(AWAY[how])
            time.sleep(seconds if step == "published" else 10)
            bed.at_store.lift()

    life.at = outage
    bed.run(life, ["tune", "serve"])
    bed.silent(life)
    assert bed.operator.process is not None and bed.operator.process.poll() is None, "the operator was not restarted"


STORE = {
    "slow down": [Fault(**{**vars(SLOW_DOWN), "times": 4})],
    "expired token": [Fault(**{**vars(EXPIRED_TOKEN), "times": 3})],
    "denied": [Fault(status=403, code="AccessDenied", times=3)],
    "no bucket": [Fault(status=404, code="NoSuchBucket", times=4)],
    "server errors": [Fault(status=500, code="InternalError", times=4)],
    "slow": [Fault(latency=0.5)],
    "truncated": [Fault(match="adapter_model", cut_at=100, times=3)],
    "flipped bit": [Fault(match="adapter_model", flip_at=100, times=1)],
    "hanging": [Fault(match="adapters", hang_at=0, times=2)],
}  # fmt: skip


@pytest.mark.seconds(45)
@pytest.mark.parametrize("name", STORE)
def test_faults_of_the_store_that_end_change_nothing(bed: Bed, name: str) -> None:
    life = bed.new_life()
    life.patience = 180
    life.at = lambda step: bed.at_store.inject(*STORE[name]) if step in {"created", "published"} else None
    bed.run(life, ["tune", "serve"])
    bed.silent(life)


@pytest.mark.seconds(40)
def test_while_the_store_is_cut_off_nothing_is_called_wrong(bed: Bed) -> None:
    """The operator cannot know whether the version is complete: Succeeded stays Unknown. Served adapters are served on."""
    life = bed.new_life()
    bed.run(life, ["tune", "serve"])
    tenant, fleet = life.tenant, life.fleet
    tenant.job("second", output={"adapter": "support", "deletionPolicy": "Delete"})
    pod = tenant.running_pod("second")
    tenant.publish_as_trainer("second", pod)
    bed.at_store.inject(Fault(status=503, code="ServiceUnavailable"))
    tenant.end_pod(pod)
    until = time.monotonic() + 12
    while time.monotonic() < until:
        assert tenant.condition("FineTuneJob", "second", "Succeeded").get("status") != "False"
        assert tenant.condition("Adapter", "support-1.0.0", "Ready")["status"] == "True"
        assert tenant.condition("AdapterDeployment", "chat", "Available")["status"] == "True"
        assert fleet.targets() == {"support": "support-1.0.0"}
        time.sleep(0.5)
    bed.at_store.lift()
    tenant.until("FineTuneJob", "second", "Succeeded", "Published", 120)
