"""How work of many namespaces shares the operator: turns, lanes, places and locks, and short calls to the store.

This package does not know what is reconciled.
"""
