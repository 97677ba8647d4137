"""Networks in which Graft is tried. They know the servers in them, and nothing of the cluster."""
