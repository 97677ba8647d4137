"""The engine of the pod: a client for its HTTP API, and the state that the agent last observed.

This package does not know object storage.
"""
