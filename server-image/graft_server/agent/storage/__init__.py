"""From object storage to the adapters' folder on disk: download, digests, signatures, and checks of foreign files.

It does not know the engine.
"""
