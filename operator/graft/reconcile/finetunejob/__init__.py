"""The life of a FineTuneJob: placing it, its Jobs, what its pods report, restarts, and what it publishes.

It creates Adapters; it does not know how they are verified or served.
"""
