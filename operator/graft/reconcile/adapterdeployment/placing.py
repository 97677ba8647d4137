"""Decide where a deployment's replicas run: read the cluster's nodes and pass them to placement."""

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.placement import engine
from graft.placement.decide import DoesNotFit
from graft.reconcile.shared.access import Base, Trouble
from graft.reconcile.shared.context import Context


async def place_engine(ctx: Context, deployment: AdapterDeployment, base: Base) -> ServingSizing | Trouble:
    """Return the engine and the resources of a replica, or why it fits on no node.

    The present choice is kept while its inputs are unchanged, even if nodes are added or removed.
    """
    facts, task, vllm = base.model.status.facts, base.model.spec.task, bool(ctx.settings.images.vllm)
    before = deployment.status.sizing
    if before is not None and before.basis == engine.basis_of(facts, deployment.spec, task=task, vllm=vllm):
        return before
    nodes = await ctx.kube.list("Node")
    try:
        return engine.serving(facts, deployment.spec, task=task, nodes=nodes, vllm=vllm)
    except DoesNotFit as error:
        return Trouble("DoesNotFit", str(error))
