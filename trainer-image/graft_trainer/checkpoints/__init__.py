"""Checkpoints: their content, how they are written to and read from the store, and from which one an attempt resumes.

This package does not know when a checkpoint is due: the training loop decides that.
"""
