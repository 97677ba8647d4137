"""Prometheus metrics with vLLM's names, so that dashboards and autoscalers for vLLM work with this engine too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graft_server.engine.generation import Activity

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Metrics:
    """The counters and histograms of one engine."""

    def __init__(self, model_name: str, max_loras: int, activity: Callable[[], Activity]) -> None:
        self._registry = CollectorRegistry()
        # Reports the start time, by which the agent detects a restart of the engine, and the memory.
        ProcessCollector(registry=self._registry)
        self._registry.register(_ActivityCollector(model_name, max_loras, activity))
        self._model = model_name
        labels = ["model_name"]

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", text, [*labels, *more], registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(f"vllm:{name}", text, labels, registry=self._registry, buckets=SECONDS)
            made.labels(model_name)
            return made

        self._success = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._queue = histogram("request_queue_time_seconds", "Time a sequence waited before it ran.")
        self._first = histogram("time_to_first_token_seconds", "Time from arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Time between two tokens of a sequence.")
        self._latency = histogram("e2e_request_latency_seconds", "Time from arrival to the end.")

    def started(self, prompt_tokens: int) -> None:
        """Count an accepted sequence."""
        self._prompt.labels(self._model).inc(prompt_tokens)

    def token(self, since_arrival: float, since_last: float | None, queued: float) -> None:
        """Count a token of a sequence. `since_last` is None for its first token. Times are in seconds."""
        self._generated.labels(self._model).inc()
        if since_last is None:
            self._queue.labels(self._model).observe(queued)
            self._first.labels(self._model).observe(since_arrival)
        else:
            self._between.labels(self._model).observe(since_last)

    def finished(self, reason: str, seconds: float) -> None:
        """Count a sequence that ended with the reason stop, length, abort, timeout or error."""
        self._success.labels(self._model, reason).inc()
        self._latency.labels(self._model).observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _ActivityCollector(Collector):
    """A collector that reads the activity at each scrape, so that there is exactly one lora_requests_info sample."""

    def __init__(self, model_name: str, max_loras: int, activity: Callable[[], Activity]) -> None:
        self._model = model_name
        self._max_loras = max_loras
        self._activity = activity

    def collect(self) -> Iterator[Metric]:
        now = self._activity()
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", now.running),
            ("num_requests_waiting", "Sequences in the queue.", now.waiting),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters with requests; the value is the current Unix time.", labels=labels
        )
        values = [str(self._max_loras), ",".join(now.running_adapters), ",".join(now.waiting_adapters)]
        info.add_metric(values, time.time())
        yield info

        resident = GaugeMetricFamily("graft_engine_lora_resident", "Adapters in memory.", labels=["lora_name"])
        for name in sorted(set(now.resident_adapters)):
            resident.add_metric([name], 1)
        yield resident
