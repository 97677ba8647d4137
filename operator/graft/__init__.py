"""Graft's light package, which every image installs: the API, the contracts, and the operator.

It imports no torch, and it does not know the code of the trainer or of the server image.
"""

__version__ = "0.1.0"  # as in pyproject.toml and in the chart; a test compares them
