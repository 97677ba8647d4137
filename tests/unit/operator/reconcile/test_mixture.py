"""What a preset leaves out of a mixture is in the job's condition while it trains."""

from graft.api import FineTuneJob
from graft.contracts.progress import Progress
from graft.reconcile.finetunejob.jobstatus import World, _warnings


def test_the_condition_says_what_the_preset_does_not_reach() -> None:
    spec = {
        "baseModel": "m", "dataset": {"train": {"uri": "s3://bucket/d.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "a"},
    }  # fmt: skip
    world = World(FineTuneJob.model_validate({"metadata": {"name": "j"}, "spec": spec}))
    text = "spec.method.lora.targetModules: no preset reaches the experts of this mixture. Method full trains them."
    world.progress = Progress(attempt="p", stage="Training", updated_at="2026-01-01T00:00:00Z", unreached=text)
    assert _warnings(world) == f"{text.rstrip('.')}; "
    world.progress = None
    assert _warnings(world) == ""
