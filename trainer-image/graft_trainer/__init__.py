"""The training pod: prepare, train, evaluate, publish.

It knows nothing about Kubernetes: it reads its job from a file, talks to object storage, and says how it ended in its
progress.json, its termination message and its exit code. Only train, evaluate and what they import need torch.
"""
