"""The agent's Prometheus metrics."""

from collections import Counter as Count
from collections.abc import Iterable
from typing import get_args

from graft.contracts.agent import AdapterState, ResidentAdapter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STATES = get_args(AdapterState)


class Metrics:
    """Of one agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.load_seconds = Histogram(
            "graft_agent_adapter_load_seconds",
            "From the decision to fetch an adapter until the engine has it; stage download or load for its parts.",
            ["stage"],
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
            registry=self.registry,
        )
        self.bytes = Counter(
            "graft_agent_downloaded_bytes", "Bytes of verified adapters fetched.", registry=self.registry
        )
        self.resumed_bytes = Counter(
            "graft_agent_resumed_bytes", "Bytes that an earlier attempt had left on disk.", registry=self.registry
        )
        self.downloads = Counter(
            "graft_agent_downloads",
            "Downloads of versions that ended; result done, failed, or abandoned when no longer wanted.",
            ["result"],
            registry=self.registry,
        )
        self.cache_bytes = Gauge(
            "graft_agent_cache_bytes",
            "Bytes on disk; use wanted, or kept of versions that are not wanted any more.",
            ["use"],
            registry=self.registry,
        )
        self.cache_limit = Gauge("graft_agent_cache_limit_bytes", "What the disk holds.", registry=self.registry)
        self.evictions = Counter(
            "graft_agent_evictions", "Kept versions that were deleted to make room.", registry=self.registry
        )
        self.failures = Counter(
            "graft_agent_failures", "Actions that failed, by reason.", ["reason"], registry=self.registry
        )
        self.unloads = Counter("graft_agent_unloads", "Adapters unloaded after draining.", registry=self.registry)
        self.restarts = Counter("graft_agent_engine_starts", "Starts of the engine seen.", registry=self.registry)
        self.adapters = Gauge("graft_agent_adapters", "Adapters, by state.", ["state"], registry=self.registry)
        self.resident = Gauge(
            "graft_agent_adapter_resident",
            "1 for each adapter that the engine has.",
            ["adapter"],
            registry=self.registry,
        )
        self.ready = Gauge("graft_agent_ready", "1 while the pod is ready.", registry=self.registry)
        self.engine_up = Gauge("graft_agent_engine_up", "1 while the engine answers.", registry=self.registry)
        self.wanted_age = Gauge(
            "graft_agent_wanted_age_seconds",
            "Seconds since the API server last confirmed what is wanted; -1 before the first time.",
            registry=self.registry,
        )

    def show(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Set the gauges of the adapters."""
        listed = list(adapters)
        counts = Count(adapter.state for adapter in listed)
        for state in STATES:
            self.adapters.labels(state).set(counts[state])
        self.resident.clear()
        for adapter in listed:
            if adapter.state in ("Loaded", "Draining"):
                self.resident.labels(adapter.adapter).set(1)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
