"""What the reconcilers of all kinds share: the work queue, the context of a reconcile, access, pods, clean-up.

It does not know any kind's life cycle.
"""
