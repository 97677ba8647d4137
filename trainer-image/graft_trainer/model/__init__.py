"""The model in memory: load the base model, add what the method trains, shard the model and place it on devices.

The package knows methods and architectures. It does not know the training loop, the store or the dataset's files.
"""
