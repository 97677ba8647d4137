"""The adapter artifact: its manifest, digests, signature and layout in object storage, and the S3 store.

It knows buckets and files. It does not know Kubernetes, and it does not load a model.
"""
