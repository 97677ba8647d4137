"""Versions of an adapter: publish one that was trained, or compose or import one without training.

It knows the manifest and the order of uploads; it does not know how a model is trained.
"""
