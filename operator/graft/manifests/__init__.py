"""Build the Kubernetes objects of a resource as dicts (PURE), with one file per child.

The builders know a resource and the settings. They do not read the cluster, and they decide nothing that can fail.
"""
