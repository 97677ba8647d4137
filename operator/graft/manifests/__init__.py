"""PURE: resource -> Kubernetes objects as dicts, one file per child."""
