"""The command `graft`, which people run on their own machine with their own kubeconfig."""
