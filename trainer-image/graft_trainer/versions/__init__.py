"""Versions of an adapter: publish a trained version, or compose or import a version without training.

It knows the manifest and the order of uploads. It does not know how a model is trained.
"""
