"""The training loop: optimizer steps in order, progress, the held-out loss, and when a checkpoint is due.

It trains every parameter that requires a gradient; it does not know methods or what is published.
"""
