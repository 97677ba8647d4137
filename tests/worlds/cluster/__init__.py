"""What the tests on a real API server share: the operator's process, tenants, nodes and serving pods.

Nothing here runs containers: that is the e2e suite's.
"""
