"""Graft's light package: the API, the contracts and the operator. Nothing here imports torch."""
