"""What the agent reports: the residency of its pod to the operator, and metrics to Prometheus.

This package only reports. It changes neither the engine nor the disk.
"""
