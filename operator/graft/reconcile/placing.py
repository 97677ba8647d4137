"""Where a job is to train: the nodes that there are, handed to placement."""

from graft import placement
from graft.api import FineTuneJob
from graft.api.finetunejob import Sizing
from graft.manifests.training import Shape
from graft.placement.decide import DoesNotFit
from graft.reconcile.access import Base, Trouble
from graft.reconcile.context import Context


async def place(ctx: Context, job: FineTuneJob, base: Base) -> tuple[Shape, Sizing] | Trouble:
    """The pods of the run and the estimate that they come from; Trouble when no node would do."""
    spec = job.spec
    try:
        decision = placement.training(
            base.model.status.facts,
            spec.method,
            spec.training,
            task=base.model.spec.task,
            nodes=await ctx.kube.list("Node"),
            placement=spec,
            spot_taints=ctx.settings.spot.taints if spec.spot else (),
            explicit=spec.resources,
            nodes_wanted=spec.nodes,
        )
    except DoesNotFit as error:
        return Trouble("DoesNotFit", str(error))
    shape = Shape(decision.resources, decision.nodes, decision.node_selector, decision.choice)
    return shape, decision.sizing
