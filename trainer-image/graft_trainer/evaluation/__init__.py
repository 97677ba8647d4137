"""Measure the tuned model: held-out loss, answers, suites, baselines, gates.

The model is already loaded. This package does not train and does not publish.
"""
