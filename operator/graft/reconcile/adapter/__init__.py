"""The life of an Adapter: how a version is made without training, verified, signed, archived, retained and deleted.

It does not know how replicas load a version.
"""
