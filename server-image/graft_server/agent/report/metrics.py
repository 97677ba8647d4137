"""The agent's Prometheus metrics."""

from collections import Counter as Count
from collections.abc import Iterable
from typing import get_args

from graft import __version__
from graft.contracts.agent import AdapterState, ResidentAdapter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

STATES = get_args(AdapterState)


class Metrics:
    """The metrics of one agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("graft_build", "The version.", registry=self.registry).info({"component": "agent", "version": __version__})
        self.load_seconds = Histogram(
            "graft_agent_adapter_load_seconds",
            "Seconds by stage: download, load, and all from the decision to download until the engine answers with the adapter.",
            ["stage"],
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
            registry=self.registry,
        )
        self.bytes = Counter(
            "graft_agent_downloaded_bytes", "Bytes of verified adapters that were downloaded.", registry=self.registry
        )
        self.resumed_bytes = Counter(
            "graft_agent_resumed_bytes", "Bytes that an earlier attempt had already downloaded.", registry=self.registry
        )
        self.downloads = Counter(
            "graft_agent_downloads",
            "Ended downloads of versions: done, failed, or abandoned because the version was no longer wanted.",
            ["result"],
            registry=self.registry,
        )
        self.cache_bytes = Gauge(
            "graft_agent_cache_bytes",
            "Bytes on disk, by use: wanted, or kept for versions that are no longer wanted.",
            ["use"],
            registry=self.registry,
        )
        self.cache_limit = Gauge(
            "graft_agent_cache_limit_bytes", "Bytes that the adapters may take on the disk.", registry=self.registry
        )
        self.evictions = Counter(
            "graft_agent_evictions", "Kept versions that were deleted to free space.", registry=self.registry
        )
        self.failures = Counter(
            "graft_agent_failures", "Actions that failed, by reason.", ["reason"], registry=self.registry
        )
        self.unloads = Counter("graft_agent_unloads", "Adapters unloaded after draining.", registry=self.registry)
        self.restarts = Counter("graft_agent_engine_starts", "Observed starts of the engine.", registry=self.registry)
        self.adapters = Gauge("graft_agent_adapters", "Adapters by state.", ["state"], registry=self.registry)
        self.resident = Gauge(
            "graft_agent_adapter_resident",
            "1 for each adapter that the engine has loaded.",
            ["adapter"],
            registry=self.registry,
        )
        self.ready = Gauge("graft_agent_ready", "1 while the pod is ready.", registry=self.registry)
        self.engine_up = Gauge("graft_agent_engine_up", "1 while the engine answers.", registry=self.registry)
        self.wanted_age = Gauge(
            "graft_agent_wanted_age_seconds",
            "Seconds since the API server last confirmed the wanted adapters; -1 before the first time.",
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
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)
