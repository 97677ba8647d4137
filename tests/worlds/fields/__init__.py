"""Values of every field of the four kinds, made from the schema: valid ones up to the edges, and wrong ones.

A new field is covered without a change here. A field whose valid values the schema cannot express has a line in
`hints.py`.
"""
