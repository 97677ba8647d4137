"""The adapter artifact: manifest, digests, layout in object storage, and the S3 store."""
