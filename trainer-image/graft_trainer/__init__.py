"""The training pod: prepare, train, evaluate, publish."""
