"""Faults between the operator and its API server and store, and the state that must be the same with and without them.

Nothing here knows how the operator is built. It sees requests, watch events, resources and stored objects.
"""
