"""What the tuned model is worth: held-out loss, answers, suites, baselines, gates.

It measures a model that is already loaded; it does not train and does not publish.
"""
