"""Choose where a job runs (PURE): from model facts, method and lengths to memory, and from memory to GPUs and nodes.

facts: config.json -> facts. blocks: facts -> matrices. activations, estimate: matrices -> bytes. offers: nodes -> GPUs.
choose: bytes and GPUs -> the smallest GPUs that fit. decide: GPUs -> resources of the pods. explain: texts for users.
serving estimates the memory of an engine, and engine chooses its GPUs and flags. replicas and replicaroom distribute
adapters over the replicas of an engine.

The package does not read the cluster: nodes, facts and specs are its arguments.
"""

from graft.placement.decide import Decision, DoesNotFit, training

__all__ = ["Decision", "DoesNotFit", "training"]
