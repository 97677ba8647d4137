"""Shared parts of the tests with a real API server: the operator's process, tenants, nodes and serving pods.

Nothing here runs containers. Only the e2e suite does, which tries the flows of `flows.py` between its pods.
"""
