"""Reconcile each kind: gather, decide (pure), apply. One package per kind, and `shared` for all kinds.

Reconciles are level-triggered: an event only starts one, it carries no data. The builders of objects are in manifests.
"""
