"""The agent's next actions and the memory that they need (PURE): disk space, retries, readiness, reasons.

This package knows neither the object store nor the engine.
"""
