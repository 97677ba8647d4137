"""The engine beside the agent: its HTTP contract, and what was last seen of it.

It does not know object storage.
"""
