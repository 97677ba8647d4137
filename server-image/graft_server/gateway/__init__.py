"""The OpenAI-compatible gateway: it sends each request to a replica that has the model's adapter loaded.

It knows the routes that the operator publishes. It does not load adapters, and it does not choose their versions.
"""
