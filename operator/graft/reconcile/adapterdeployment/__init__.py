"""The life of an AdapterDeployment: serving pods, which replica loads which adapter, routes and scaling.

It reads Adapters; it does not change them.
"""
