"""The training pod: prepare, train, evaluate, publish.

It knows nothing about Kubernetes. It reads its job from a file and uses object storage. It reports its end in
progress.json, its termination message and its exit code. Only train, evaluate and the modules that they import need
torch.
"""
