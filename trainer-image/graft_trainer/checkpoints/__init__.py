"""Checkpoints: what is in one, how it is written to and read from the store, and from which one an attempt resumes.

It does not know when a checkpoint is due: the training loop decides that.
"""
