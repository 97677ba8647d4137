"""What several tests share: tiny models and datasets, stores, fake engines and clusters.

Nothing here asserts on the product; the tests do.
"""
