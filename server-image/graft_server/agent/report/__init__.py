"""What the agent reports: the residency of its pod to the operator, and metrics to Prometheus.

It does not change what it reports about.
"""
