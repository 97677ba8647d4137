"""From a line of a user's file to the tokens of a micro-batch: formats, templates, tokens, loss masks, packing and order.

It knows the tokenizer and the dataset's spec; it does not know the model's weights or the optimizer.
"""
