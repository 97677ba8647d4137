"""The ranks of a run: how a pod starts them, how they find each other, and how they exchange values.

The package does not know what the ranks compute.
"""
