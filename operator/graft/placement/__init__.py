"""Where a job runs (PURE): model facts, method and lengths -> memory -> GPUs, their number and nodes.

facts: config.json -> facts; blocks: facts -> matrices; activations, estimate: matrices -> bytes; offers: nodes -> GPUs;
choose: both -> the smallest that fits; decide: that -> resources of the pods. `serving` estimates an engine, and engine
chooses its GPUs and flags; `replicas` and `replicaroom` spread adapters over its replicas.
"""

from graft.placement.decide import Decision, DoesNotFit, training

__all__ = ["Decision", "DoesNotFit", "training"]
