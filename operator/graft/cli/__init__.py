"""The command `graft`, which people run on their own machine with their own kubeconfig.

It reads reports and verifies signatures. It does not change anything in the cluster.
"""
