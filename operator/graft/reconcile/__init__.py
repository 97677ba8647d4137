"""Reconcile each kind: gather, decide (pure), apply. There is one room per kind, over one for what all share.

Reconciles are level-triggered: an event only starts one, it carries no data. The builders of objects are in manifests.
"""
