"""One attempt of a job: its job file, paths, object store, progress, downloads, uploads, failures and interruption.

It does not know what is trained. It does not import torch.
"""
