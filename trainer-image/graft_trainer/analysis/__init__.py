"""What the report says about the learned update itself: its size, rank, similarity to the data, and latency.

It reads the tuned model; it decides nothing.
"""
