"""From object storage to the adapters' folder on disk: downloads, digests, signatures, and checks of untrusted files.

This package does not know the engine.
"""
