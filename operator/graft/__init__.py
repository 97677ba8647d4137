"""Graft's light package, which every image installs: the API, the contracts, and the operator.

It imports no torch, and it does not know the code of the trainer or of the server image.
"""
