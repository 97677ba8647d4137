"""Decide where a job trains: read the cluster's nodes and pass them to placement."""

from graft import placement
from graft.api import FineTuneJob
from graft.api.finetunejob import Sizing
from graft.manifests.training import Shape
from graft.placement.decide import DISK, DoesNotFit
from graft.reconcile.shared.access import Base, Trouble
from graft.reconcile.shared.context import Context


async def place(ctx: Context, job: FineTuneJob, base: Base) -> tuple[Shape, Sizing] | Trouble:
    """Return the pods of the run and the estimate that they are based on, or why the job fits on no node.

    The estimate uses the length of the longest example if the preflight Job has measured it.
    """
    spec, data = job.spec, job.status.dataset
    longest = data.max_tokens if data is not None and not data.sampled else 0
    try:
        decision = placement.training(
            base.model.status.facts,
            spec.method,
            spec.training,
            task=base.model.spec.task,
            nodes=await ctx.cache.list("Node"),
            placement=spec,
            spot_taints=ctx.settings.spot.taints if spec.spot else (),
            explicit=spec.resources,
            nodes_wanted=spec.nodes,
            dataset_max_length=longest or None,
            download=0 if base.ref.uri.startswith("pvc://") else base.model.status.size_bytes or 0,
        )
    except DoesNotFit as error:
        return Trouble("DoesNotFit", str(error))
    resources = decision.resources
    if spec.queue is not None and spec.resources is None and resources is not None:
        # Kueue does not admit a Job that requests a resource which its ClusterQueue does not cover. Few cover the disk.
        asked = {name: amount for name, amount in (resources.requests or {}).items() if name != DISK}
        resources = resources.model_copy(update={"requests": asked})
    shape = Shape(resources, decision.nodes, decision.node_selector, decision.choice)
    return shape, decision.sizing
