"""The values of a run. If the spec leaves a value open, it is derived here from the device, the model and the data.

The package computes values only. It loads and downloads nothing.
"""
