"""Build the Kubernetes objects of a resource as dicts (PURE), with one file per child."""
