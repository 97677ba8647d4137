"""Turn the lines of a user's file into the tokens of micro-batches: formats, templates,
tokens, loss masks, packing and order.

The package knows the tokenizer and the dataset's spec. It does not know the model's weights or the optimizer.
"""
