"""Where a deployment's replicas run: reads the cluster's nodes and hands them to placement."""

from graft.api import AdapterDeployment
from graft.api.adapterdeployment import ServingSizing
from graft.placement import engine
from graft.placement.decide import DoesNotFit
from graft.reconcile.shared.access import Base, Trouble
from graft.reconcile.shared.context import Context


async def place_engine(ctx: Context, deployment: AdapterDeployment, base: Base) -> ServingSizing | Trouble:
    """What a replica is given. The choice in force is kept as long as what it was made from is the same, whatever nodes come
    and go; Trouble when no node would do."""
    facts, task, vllm = base.model.status.facts, base.model.spec.task, bool(ctx.settings.images.vllm)
    before = deployment.status.sizing
    if before is not None and before.basis == engine.basis_of(facts, deployment.spec, task=task, vllm=vllm):
        return before
    nodes = await ctx.kube.list("Node")
    try:
        return engine.serving(facts, deployment.spec, task=task, nodes=nodes, vllm=vllm)
    except DoesNotFit as error:
        return Trouble("DoesNotFit", str(error))
