"""Prometheus metrics of the resources: how many are in which condition, what running jobs do, and how jobs ended.

They follow the changes of the cache and send no request. Users cannot add time series without limit: reasons are those
that the operator knows, and only running jobs have series of their own, EACH of a namespace. Labels are named so that
none has the name of a label that Prometheus adds to a target (namespace, job, pod).
"""

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

JOB, TENANT = "FineTuneJob", "Tenant"
STAGES = (
    "Waiting", "Queued", "Suspended", "Pending", "Preparing", "Training", "Evaluating", "Publishing",
    "Succeeded", "Failed", "Rejected",
)  # fmt: skip
RUNNING = frozenset({"Preparing", "Training", "Evaluating", "Publishing"})
OUTCOMES = {
    "Succeeded": "succeeded",
    "Rejected": "rejected",
    "Failed": "failed",
}  # stage of a job that ended -> outcome
ENDS = ("True", "False")  # status of Succeeded
ATTEMPTS = ("Completed", "Preempted")  # reasons of attempts that are no reasons of jobs
OTHER = "Other"  # of a value that no version of the operator has written
OF_TENANTS = 5000  # namespaces of Tenants with time series of their own
NAMED, EACH = 1000, 200  # running jobs with time series of their own, in all and of one namespace
NAMESPACE = "resource_namespace"

Raw: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[str, str]  # namespace ("" for a BaseModel or a Tenant) and name
Counts: TypeAlias = Counter[tuple[str, ...]]
Values: TypeAlias = Iterable[tuple[Sequence[str], float]]  # values of labels, and the value


class Running(NamedTuple):
    """What a running job shows. Absent values are None."""

    stage: str
    progress: float | None  # share of the steps, 0 to 1
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None


class GpuClock:
    """The time for which jobs hold GPUs, added up by namespace."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: dict[Place, tuple[int, float]] = {}  # job -> GPUs, and the time until which they are counted
        self.seconds: defaultdict[str, float] = defaultdict(float)  # namespace -> seconds times GPUs

    def set(self, job: Place, gpus: int) -> None:
        """Count the time until now with the GPUs that the job held, and note those that it holds from now on."""
        held, since = self._held.pop(job, (0, 0.0))
        now = self._clock()
        if held:
            self.seconds[job[0]] += held * (now - since)
        if gpus:
            self._held[job] = (gpus, now)

    def held(self) -> Counter[tuple[str, ...]]:
        """Return the GPUs that jobs hold now, by namespace, and count the time until now."""
        found: Counter[tuple[str, ...]] = Counter()
        for job, (gpus, _) in list(self._held.items()):
            self.set(job, gpus)
            found[job[:1]] += gpus
        return found


class Resources(Collector):
    """The metrics of all resources of one cluster.

    `reasons`: kind -> condition type -> reasons. `shown`: whether this operator works. A standby shows nothing, so that
    a sum over all operators counts each resource once.
    """

    def __init__(
        self,
        reasons: dict[str, dict[str, dict[str, str]]],
        shown: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reasons, self._shown = reasons, shown
        self._lock = threading.Lock()  # changes come from the event loop, and scrapes from a thread
        self._conditions: Counts = Counter()  # kind, namespace, type, status, reason
        self._stages: Counts = Counter()  # namespace, stage
        self._running: dict[Place, Running] = {}
        self._ended: Counts = Counter()  # namespace, outcome
        self._failures: Counts = Counter()  # namespace, reason
        self._attempts: Counts = Counter()  # namespace, reason
        self._gpus = GpuClock(clock)
        self._tenants: dict[str, list[str]] = {}  # Tenant -> its namespaces

    def note(self, kind: str, place: Place, old: Raw | None, new: Raw | None) -> None:
        """Take a change of a resource: its state before (None if it did not exist), and now (None if it does not)."""
        with self._lock:
            self._count(self._conditions, ((kind, place[0], *item) for item in self._conditions_of(kind, old)), -1)
            self._count(self._conditions, ((kind, place[0], *item) for item in self._conditions_of(kind, new)), 1)
            if kind == JOB:
                self._note_job(place, old, new)
            elif kind == TENANT:
                self._tenants[place[1]] = list(_status(new).get("namespaces") or [])
                if not self._tenants[place[1]]:
                    del self._tenants[place[1]]

    def forget(self, namespace: str) -> None:
        """Remove the counters of a namespace that no longer exists."""
        with self._lock:
            for counts in (self._ended, self._failures, self._attempts):
                for key in [key for key in counts if key[0] == namespace]:
                    del counts[key]
            self._gpus.seconds.pop(namespace, None)

    def _note_job(self, place: Place, old: Raw | None, new: Raw | None) -> None:
        namespace = place[0]
        self._count(self._stages, [(namespace, _stage(old))] if old is not None else [], -1)
        self._count(self._stages, [(namespace, _stage(new))] if new is not None else [], 1)
        for outcome in OUTCOMES.values():  # a series must begin with 0, or Prometheus does not see that it increased
            self._ended.setdefault((namespace, outcome), 0)
        self._gpus.set(place, _gpus(new))
        found = _running(new)
        if found is None:
            self._running.pop(place, None)
        else:
            self._running[place] = found
        if old is None or new is None:  # another operator counted what ended before this one started
            return
        truth, reason = _succeeded(new)
        if _succeeded(old)[0] not in ENDS and truth in ENDS:
            self._ended[namespace, OUTCOMES.get(_stage(new), "failed")] += 1
            if truth == "False":
                self._failures[namespace, self._reason(JOB, "Succeeded", reason)] += 1
        known = _ended_attempts(old)
        for pod, why in _ended_attempts(new).items():
            if pod not in known:
                self._attempts[namespace, why if why in ATTEMPTS else self._reason(JOB, "Succeeded", why)] += 1

    def _conditions_of(self, kind: str, raw: Raw | None) -> Iterator[tuple[str, str, str]]:
        for item in ((raw or {}).get("status") or {}).get("conditions") or []:
            if (type_ := item.get("type")) in self._reasons[kind]:
                yield type_, str(item.get("status")), self._reason(kind, type_, str(item.get("reason")))

    def _reason(self, kind: str, type_: str, reason: str) -> str:
        return reason if reason in self._reasons[kind][type_] else OTHER

    @staticmethod
    def _count(counts: Counts, keys: Iterable[tuple[str, ...]], by: int) -> None:
        for key in keys:
            counts[key] += by
            if not counts[key]:
                del counts[key]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        if self._shown():
            with self._lock:
                found = [*self._states(), *self._jobs(), *self._counters()]
            yield from found

    def _states(self) -> Iterator[Metric]:
        labels = ["kind", NAMESPACE, "type", "status", "reason"]
        yield _gauge(
            "graft_conditions", "Resources by condition, as in status.conditions.", labels, self._conditions.items()
        )
        yield _gauge(
            "graft_jobs", "FineTuneJobs by stage, as in status.stage.", [NAMESPACE, "stage"], self._stages.items()
        )
        pairs = (((tenant, name), 1.0) for tenant, names in self._tenants.items() for name in names)
        text = "1 for each namespace of each Tenant."
        yield _gauge("graft_tenant_namespace", text, ["tenant", NAMESPACE], itertools.islice(pairs, OF_TENANTS))

    def _jobs(self) -> Iterator[Metric]:
        taken: Counter[str] = Counter()
        named: list[tuple[Place, Running]] = []
        for place, job in self._running.items():
            if len(named) < NAMED and taken[place[0]] < EACH:
                taken[place[0]] += 1
                named.append((place, job))
        labels = [NAMESPACE, "finetunejob"]
        stages = {(*place, job.stage): 1 for place, job in named}
        yield _gauge(
            "graft_job_stage", "1 for the stage of each running FineTuneJob.", [*labels, "stage"], stages.items()
        )
        for name, text in (
            ("progress", "Share of the steps that a running FineTuneJob has done, 0 to 1."),
            ("loss", "Training loss of a running FineTuneJob, in nats per token."),
            ("eval_loss", "Loss of a running FineTuneJob on the held-out examples, in nats per token."),
            ("tokens_per_second", "Training tokens per second of a running FineTuneJob."),
            ("eta_seconds", "Estimated seconds until the stage of a running FineTuneJob ends."),
        ):
            values = [(place, value) for place, job in named if (value := getattr(job, name)) is not None]
            yield _gauge(f"graft_job_{name}", text, labels, values)
        left = [((), len(self._running) - len(named))]
        yield _gauge("graft_job_series_left_out", "Running FineTuneJobs without time series of their own.", [], left)

    def _counters(self) -> Iterator[Metric]:
        yield _gauge("graft_job_gpus", "GPUs that pods of FineTuneJobs hold.", [NAMESPACE], self._gpus.held().items())
        seconds = [((namespace,), value) for namespace, value in self._gpus.seconds.items()]
        by_reason = [NAMESPACE, "reason"]
        for name, text, labels, values in (
            ("graft_job_gpu_seconds", "Seconds for which pods of jobs held a GPU, for each GPU.", [NAMESPACE], seconds),
            ("graft_jobs_ended", "FineTuneJobs that ended.", [NAMESPACE, "outcome"], self._ended.items()),
            ("graft_job_failures", "FineTuneJobs that failed or were rejected.", by_reason, self._failures.items()),
            ("graft_job_attempts_ended", "Pods of FineTuneJobs that ended.", by_reason, self._attempts.items()),
        ):
            family = CounterMetricFamily(name, text, labels=labels)
            for key, value in values:
                family.add_metric(key, value)
            yield family


def _gauge(name: str, text: str, labels: list[str], values: Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _status(raw: Raw | None) -> Raw:
    return (raw or {}).get("status") or {}


def _stage(raw: Raw | None) -> str:
    """Return the stage of a job. A job that was not reconciled yet waits."""
    found = _status(raw).get("stage") or "Waiting"
    return found if found in STAGES else OTHER


def _succeeded(raw: Raw | None) -> tuple[str, str]:
    """Return status and reason of a job's condition Succeeded."""
    for item in _status(raw).get("conditions") or []:
        if item.get("type") == "Succeeded":
            return str(item.get("status")), str(item.get("reason"))
    return "Unknown", ""


def _running(raw: Raw | None) -> Running | None:
    """Return what a job shows while its pods work, or None."""
    if (stage := _stage(raw)) not in RUNNING:
        return None
    found = _status(raw).get("progress") or {}
    steps = found.get("totalSteps")
    return Running(
        stage,
        found.get("step", 0) / steps if steps else None,
        *(found.get(name) for name in ("loss", "evalLoss", "tokensPerSecond", "etaSeconds")),
    )


def _gpus(raw: Raw | None) -> int:
    """Return the GPUs that the pods of a job hold: those of the attempts that have started and not ended."""
    if _succeeded(raw)[0] in ENDS:
        return 0
    status = _status(raw)
    pods = [item for item in status.get("attempts") or [] if item.get("startedAt") and not item.get("reason")]
    return len(pods) * int((status.get("sizing") or {}).get("gpusPerNode") or 0)


def _ended_attempts(raw: Raw) -> dict[str, str]:
    """Return the pods of a job that have ended, and why."""
    return {
        str(item.get("pod")): str(item["reason"]) for item in _status(raw).get("attempts") or [] if item.get("reason")
    }
