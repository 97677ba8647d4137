"""The training loop: optimizer steps in order, progress, the held-out loss, and when a checkpoint is due.

It trains every parameter that requires a gradient. It does not know the methods or what is published.
"""
