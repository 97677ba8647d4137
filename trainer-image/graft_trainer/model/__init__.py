"""The model in memory: loading the base model, adding what the method trains, sharding it and placing it on devices.

It knows methods and architectures; it does not know the training loop, the store or the dataset's files.
"""
