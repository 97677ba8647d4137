"""The gateway's Prometheus metrics. Only existing models become label values, so clients cannot add time series.

A tenant can have thousands of models. Of each namespace, the first NAMED_OF_A_NAMESPACE models that get requests have time
series of their own. The other models share the series of `<namespace>/*`.
"""

from collections import Counter as Count
from collections.abc import Callable, Mapping

from graft import __version__
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
UNKNOWN = ""
NAMED = 1000  # models with their own time series
NAMED_OF_A_NAMESPACE = 200
FORGOTTEN_AT_ONCE = 20  # models; removing a time series searches through all of them


class Metrics:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        Info("graft_build", "The version.", registry=registry).info({"component": "gateway", "version": __version__})
        self._named: set[str] = set()
        self._of_namespace: Count[str] = Count()
        self.requests = Counter(
            "graft_gateway_requests",
            "Requests by model and HTTP status. 499: client disconnected. broken: stream ended with an error event.",
            ["model", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "graft_gateway_request_seconds",
            "Seconds from a request's arrival to the last byte of the answer.",
            ["model"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.first_byte = Histogram(
            "graft_gateway_first_byte_seconds",
            "Seconds from a request's arrival to the first byte of the answer.",
            ["model"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.tokens = Counter(
            "graft_gateway_tokens",
            "Tokens by model, its namespace, and type: prompt or completion. Each step of a sequence counts.",
            ["model", "model_namespace", "type"],
            registry=registry,
        )
        self.in_flight = Gauge("graft_gateway_in_flight", "Requests that wait or are answered now.", registry=registry)
        self.deployment_in_flight = Gauge(
            "graft_gateway_deployment_in_flight",
            "Requests that wait or are answered now, by AdapterDeployment. Autoscalers use it.",
            ["deployment_namespace", "deployment"],
            registry=registry,
        )
        self.held = Gauge(
            "graft_gateway_held", "Requests that wait for a deployment to wake, by model.", ["model"], registry=registry
        )
        self.retries = Counter(
            "graft_gateway_retries",
            "Retries of requests, by the reason why the attempt before failed.",
            ["reason"],
            registry=registry,
        )
        self.models = Gauge("graft_gateway_models", "Models in the routing table.", registry=registry)
        self.problems = Gauge(
            "graft_gateway_table_problems", "Parts of the routing table that were refused.", registry=registry
        )
        self.table_age = Gauge(
            "graft_gateway_table_age_seconds",
            "Seconds since the API server last confirmed the routing table; -1 before the first time.",
            registry=registry,
        )

    def count_tokens(self, model: str, used: Mapping[str, int]) -> None:
        """Count the tokens of an answer. `used`: prompt_tokens and completion_tokens, by the engine's count."""
        label, namespace = self.label(model), model.partition("/")[0]
        for kind in ("prompt", "completion"):
            if count := used.get(f"{kind}_tokens"):
                self.tokens.labels(label, namespace, kind).inc(count)

    def label(self, model: str) -> str:
        """Return the value of the label `model` for a model that exists."""
        namespace = model.partition("/")[0]
        if model in self._named:
            return model
        if len(self._named) >= NAMED or self._of_namespace[namespace] >= NAMED_OF_A_NAMESPACE:
            return f"{namespace}/*"
        self._named.add(model)
        self._of_namespace[namespace] += 1
        return model

    def keep_only(self, exists: Callable[[str], bool]) -> None:
        """Remove the time series of models that no longer exist, some with each call."""
        gone = [model for model in self._named if not exists(model)]
        for model in gone[:FORGOTTEN_AT_ONCE]:
            self._named.discard(model)
            self._of_namespace[model.partition("/")[0]] -= 1
            for metric in (self.requests, self.seconds, self.first_byte, self.held, self.tokens):
                metric.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)
