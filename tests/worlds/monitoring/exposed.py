"""The metrics that the operator, the gateway and the agents expose, from their registries."""

import graft.metrics  # noqa: F401 - registers the operator's
from graft.metrics.resources import Resources
from graft.status import REASONS
from graft_server.agent.report.metrics import Metrics as AgentMetrics
from graft_server.gateway.metrics import Metrics as GatewayMetrics
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

Metrics = dict[str, frozenset[str]]  # name -> labels
PARTS = ("operator", "gateway", "agent")
OURS = ("graft_", "process_")
# A job with every value that a metric shows, before and after it ended.
RUNS = {
    "stage": "Training",
    "conditions": [{"type": "Succeeded", "status": "Unknown", "reason": "Training"}],
    "progress": {"step": 1, "totalSteps": 2, "loss": 1.0, "evalLoss": 1.0, "tokensPerSecond": 1.0, "etaSeconds": 1},
    "sizing": {"gpusPerNode": 1},
    "attempts": [{"pod": "a", "startedAt": "2026-01-01T00:00:00Z"}],
}
FAILED = RUNS | {
    "stage": "Failed",
    "conditions": [{"type": "Succeeded", "status": "False", "reason": "OutOfMemory"}],
    "attempts": [{"pod": "a", "startedAt": "2026-01-01T00:00:00Z", "reason": "MemoryExceeded"}],
}


def exposed(part: str) -> Metrics:
    """Return the metrics of a part with the labels that it sets. A histogram has its name without a suffix."""
    return {name: labels for name, (_, labels) in _families(part).items()}


def samples(part: str) -> Metrics:
    """Return the time series of a part, by the names that a query uses."""
    found: Metrics = {}
    for name, (type_, labels) in _families(part).items():
        if type_ == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


def _families(part: str) -> dict[str, tuple[str, frozenset[str]]]:
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for collector in _collectors(part):
        for family in collector.collect():
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            if isinstance(collector, MetricWrapperBase):  # it has no sample before it was set
                labels |= set(collector._labelnames)
            if name.startswith(OURS):
                found[name] = (family.type, frozenset(labels))
    return found


def _collectors(part: str) -> list[Collector]:
    if part != "operator":
        return list({"gateway": GatewayMetrics, "agent": AgentMetrics}[part]().registry._collector_to_names)
    resources = Resources(REASONS)
    place = ("shop", "tune")
    resources.note("FineTuneJob", place, None, {"status": RUNS})
    resources.note("FineTuneJob", place, {"status": RUNS}, {"status": FAILED})
    resources.note("FineTuneJob", ("shop", "other"), None, {"status": RUNS})
    resources.note("Tenant", ("", "team"), None, {"status": {"namespaces": ["shop"]}})
    registry = CollectorRegistry()
    registry.register(resources)
    return [*REGISTRY._collector_to_names, *registry._collector_to_names]
