"""The operator's Prometheus metrics: what it does, and its own health. resources.py has those of the resources.

It knows no reconciler and sends no request.
"""

from prometheus_client import Counter, Gauge, Histogram, Info

from graft import __version__

BUILD = Info("graft_build", "The version.")
BUILD.info({"component": "operator", "version": __version__})
RECONCILES = Counter("graft_reconciles_total", "Reconciles of a resource.", ["kind", "outcome"])
RECONCILE_SECONDS = Histogram(
    "graft_reconcile_seconds",
    "Duration of one reconcile in seconds.",
    ["kind"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
RESOURCES = Gauge("graft_resources", "Resources that the operator reconciles.", ["kind"])
LEADER = Gauge("graft_leader", "1 if this operator holds the Lease, or if there is only one operator.")
LIFECYCLE = Counter("graft_adapter_lifecycle_total", "Versions that were archived, restored or pruned.", ["action"])
WATCH_EVENTS = Counter("graft_watch_events_total", "Watch events, by kind of object.", ["kind"])
WATCH_RESTARTS = Counter("graft_watch_restarts_total", "Watches that ended with an error.", ["kind"])
WATCH_AGE = Gauge(
    "graft_watch_age_seconds", "Seconds since the API server last answered the watch of a kind.", ["kind"]
)
QUEUE_LENGTH = Gauge("graft_queue_length", "Resources that wait for their reconcile.")
QUEUE_AGE = Gauge("graft_queue_age_seconds", "Seconds for which the resource that waits longest has waited.")
TASKS = Gauge("graft_asyncio_tasks", "Tasks of the operator's event loop.")
