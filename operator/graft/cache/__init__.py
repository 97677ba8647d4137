"""What the operator knows of the cluster: a list and a watch for each kind, and the objects in a compact form.

It sends reads only. It knows no kind's life cycle, and it decides nothing.
"""
