"""The processes that train together: how a pod starts them, how they find each other, and what they agree on.

It does not know what they compute.
"""
