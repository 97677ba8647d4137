"""The values of a run: what the spec leaves open is derived here from the device, the model and the data.

It computes numbers only; it loads and downloads nothing.
"""
