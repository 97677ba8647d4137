"""One attempt of a job: its job file, paths, object store, progress, downloads and uploads, and how it fails or is interrupted.

It does not know what is trained, and it imports no torch.
"""
