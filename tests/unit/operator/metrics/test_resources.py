"""The metrics of resources: what they count, and that users cannot add time series without limit."""

import itertools
from typing import Any

from graft.metrics.resources import EACH, OF_TENANTS, Resources
from graft.status import REASONS
from prometheus_client import CollectorRegistry


class Cluster:
    """Jobs as the cache tells about them, and the metrics at a time that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.leads = True
        self.resources = Resources(REASONS, shown=lambda: self.leads, clock=lambda: self.now)
        self.registry = CollectorRegistry()
        self.registry.register(self.resources)
        self._jobs: dict[tuple[str, str], dict[str, Any]] = {}

    def job(self, name: str, namespace: str = "shop", **status: Any) -> None:
        """Create a job, or change its status."""
        place = (namespace, name)
        old = self._jobs.get(place)
        self._jobs[place] = {"metadata": {"name": name}, "status": (old or {}).get("status", {}) | status}
        self.resources.note("FineTuneJob", place, old, self._jobs[place])

    def delete(self, name: str, namespace: str = "shop") -> None:
        self.resources.note("FineTuneJob", (namespace, name), self._jobs.pop((namespace, name)), None)

    def value(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)

    def series(self, metric: str) -> int:
        return sum(sample.name == metric for family in self.registry.collect() for sample in family.samples)


def succeeded(status: str, reason: str) -> list[dict[str, str]]:
    return [{"type": "Succeeded", "status": status, "reason": reason}]


RUNS = {
    "stage": "Training",
    "conditions": succeeded("Unknown", "Training"),
    "progress": {"step": 25, "totalSteps": 100, "loss": 1.5, "tokensPerSecond": 900.0},
    "sizing": {"gpusPerNode": 4},
    "attempts": [{"pod": "tune-0", "startedAt": "2026-01-01T00:00:00Z"}],
}
SHOP = {"resource_namespace": "shop"}
TUNE = SHOP | {"finetunejob": "tune"}


def test_a_running_job_shows_its_stage_its_progress_and_its_loss() -> None:
    cluster = Cluster()
    cluster.job("tune", stage="Queued", conditions=succeeded("Unknown", "Queued"))
    assert cluster.value("graft_jobs", **SHOP, stage="Queued") == 1
    assert cluster.series("graft_job_progress") == 0
    cluster.job("tune", **RUNS)
    assert cluster.value("graft_jobs", **SHOP, stage="Queued") is None
    assert cluster.value("graft_jobs", **SHOP, stage="Training") == 1
    assert cluster.value("graft_job_stage", **TUNE, stage="Training") == 1
    assert cluster.value("graft_job_progress", **TUNE) == 0.25
    assert cluster.value("graft_job_loss", **TUNE) == 1.5
    assert cluster.value("graft_job_tokens_per_second", **TUNE) == 900
    assert cluster.series("graft_job_eval_loss") == 0  # not measured yet


def test_the_series_of_a_job_go_when_it_has_ended_and_when_it_is_deleted() -> None:
    cluster = Cluster()
    for name in ("tune", "other"):
        cluster.job(name, **RUNS)
    cluster.job("tune", stage="Succeeded", conditions=succeeded("True", "Published"))
    assert cluster.value("graft_job_progress", **TUNE) is None
    assert cluster.value("graft_jobs_ended_total", **SHOP, outcome="succeeded") == 1
    cluster.delete("other")
    assert cluster.series("graft_job_progress") == 0
    cluster.delete("tune")
    assert cluster.series("graft_jobs") == cluster.series("graft_conditions") == 0
    assert cluster.value("graft_jobs_ended_total", **SHOP, outcome="succeeded") == 1


def test_conditions_are_counted_by_kind_namespace_and_reason() -> None:
    cluster = Cluster()
    ready = {"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "SourceInvalid"}]}}
    cluster.resources.note("BaseModel", ("", "tiny"), None, ready)
    for name in ("one", "two"):
        cluster.job(name, **RUNS)
    labels = {"kind": "FineTuneJob", "type": "Succeeded", "status": "Unknown", "reason": "Training"}
    assert cluster.value("graft_conditions", **SHOP, **labels) == 2
    labels = {"kind": "BaseModel", "type": "Ready", "status": "False", "reason": "SourceInvalid"}
    assert cluster.value("graft_conditions", resource_namespace="", **labels) == 1


def test_what_ended_before_the_start_is_not_counted_again() -> None:
    cluster = Cluster()
    cluster.job("tune", stage="Failed", conditions=succeeded("False", "DatasetInvalid"))
    assert cluster.value("graft_jobs_ended_total", **SHOP, outcome="failed") == 0
    cluster.job("tune", stage="Training", conditions=succeeded("Unknown", "Training"))  # spec.restarts was raised
    cluster.job("tune", stage="Failed", conditions=succeeded("False", "OutOfMemory"))
    cluster.job("tune", ttl="changed")
    assert cluster.value("graft_jobs_ended_total", **SHOP, outcome="failed") == 1
    assert cluster.value("graft_job_failures_total", **SHOP, reason="OutOfMemory") == 1
    assert cluster.value("graft_job_failures_total", **SHOP, reason="DatasetInvalid") is None
    cluster.job("gated", stage="Evaluating", conditions=succeeded("Unknown", "Evaluating"))
    cluster.job("gated", stage="Rejected", conditions=succeeded("False", "GateFailed"))
    assert cluster.value("graft_jobs_ended_total", **SHOP, outcome="rejected") == 1
    assert cluster.value("graft_job_failures_total", **SHOP, reason="GateFailed") == 1


def test_attempts_are_counted_by_reason() -> None:
    cluster = Cluster()
    cluster.job("tune", **RUNS)
    ended = {"pod": "tune-0", "startedAt": "2026-01-01T00:00:00Z", "reason": "Preempted"}
    cluster.job("tune", attempts=[ended, {"pod": "tune-1"}])
    cluster.job("tune", attempts=[ended, {"pod": "tune-1", "reason": "MemoryExceeded"}])
    assert cluster.value("graft_job_attempts_ended_total", **SHOP, reason="Preempted") == 1
    assert cluster.value("graft_job_attempts_ended_total", **SHOP, reason="MemoryExceeded") == 1


def test_gpu_seconds_count_from_the_start_of_a_pod_to_its_end() -> None:
    cluster = Cluster()
    cluster.job("tune", **RUNS)
    assert cluster.value("graft_job_gpus", **SHOP) == 4
    cluster.now = 10
    assert cluster.value("graft_job_gpu_seconds_total", **SHOP) == 40
    cluster.now = 15
    cluster.job("tune", progress={"step": 30, "totalSteps": 100})
    assert cluster.value("graft_job_gpu_seconds_total", **SHOP) == 60
    cluster.job("tune", attempts=[{"pod": "tune-0", "startedAt": "2026-01-01T00:00:00Z", "reason": "Completed"}])
    cluster.now = 100
    assert cluster.value("graft_job_gpu_seconds_total", **SHOP) == 60
    assert cluster.value("graft_job_gpus", **SHOP) is None


def test_users_cannot_add_series_without_limit() -> None:
    cluster = Cluster()
    for number in range(EACH + 10):
        cluster.job(f"tune-{number}", **RUNS)
    cluster.job("tune", "other", **RUNS)
    assert cluster.series("graft_job_progress") == EACH + 1
    assert cluster.value("graft_job_series_left_out") == 10
    for number in range(20):  # a user who may write a status
        cluster.job("tune", stage=f"Own{number}", conditions=succeeded("False", f"Own{number}"))
    assert cluster.value("graft_jobs", **SHOP, stage="Other") == 1
    labels = {"kind": "FineTuneJob", "type": "Succeeded", "status": "False", "reason": "Other"}
    assert cluster.value("graft_conditions", **SHOP, **labels) == 1


def test_the_counters_of_a_deleted_namespace_go() -> None:
    cluster = Cluster()
    cluster.job("tune", **RUNS)
    cluster.now = 5
    cluster.job(
        "tune",
        stage="Succeeded",
        conditions=succeeded("True", "Published"),
        attempts=[{"pod": "a", "reason": "Completed"}],
    )
    cluster.delete("tune")
    cluster.resources.forget("shop")
    assert cluster.series("graft_jobs_ended_total") == cluster.series("graft_job_gpu_seconds_total") == 0
    assert cluster.series("graft_job_attempts_ended_total") == 0


def test_a_standby_shows_no_resources() -> None:
    cluster = Cluster()
    cluster.job("tune", **RUNS)
    cluster.leads = False
    assert list(cluster.registry.collect()) == []


def test_a_status_of_an_older_schema_breaks_nothing() -> None:
    cluster = Cluster()
    cluster.job("tune", conditions=[{}], attempts=[{}], progress=None, sizing=None)
    assert cluster.value("graft_jobs", **SHOP, stage="Waiting") == 1


def test_the_namespaces_of_tenants_are_shown_so_that_usage_can_be_added_up() -> None:
    cluster = Cluster()
    states: list[Any] = [None, {"status": {"namespaces": ["shop", "desk"]}}, {"status": {"namespaces": ["desk"]}}, None]
    for (old, new), shown in zip(itertools.pairwise(states), (["desk", "shop"], ["desk"], []), strict=True):
        cluster.resources.note("Tenant", ("", "team"), old, new)
        of_team = [
            name for name in ("desk", "shop")
            if cluster.value("graft_tenant_namespace", tenant="team", resource_namespace=name) == 1
        ]  # fmt: skip
        assert of_team == shown
    many = {"status": {"namespaces": [f"n{number}" for number in range(OF_TENANTS + 10)]}}
    cluster.resources.note("Tenant", ("", "team"), None, many)
    assert cluster.series("graft_tenant_namespace") == OF_TENANTS
