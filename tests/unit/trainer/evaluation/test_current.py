"""Gates over the adapter's current version: the evaluation measures it and the new version on the same data."""

from pathlib import Path
from typing import Any

import pytest
from graft.contracts.job import CurrentVersion
from graft_trainer.evaluation.evaluate import Evaluated
from safetensors.torch import load_file
from worlds.evaluation import TRAINING, prepared, publish_as, train_and_evaluate, trained_in
from worlds.trainer import MemoryStore

OVER_CURRENT = {
    "maxSamples": 0,
    "baselines": ["zeroShot"],
    "gates": [{"metric": "evalLoss", "minGain": 0, "over": "current"}],
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 8}},
    "promptTuning": {"promptTuning": {"virtualTokens": 4}},
    "full": {"full": {}},
}
FEW = TRAINING | {"maxSteps": 6, "learningRate": 0.003}


@pytest.fixture(scope="module")
def versions(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryStore, dict[str, Any]]:
    """A store with one version per method, and the loss that each version had when it was made."""
    store, made = MemoryStore(), {}
    for number, (name, method) in enumerate(METHODS.items()):
        run = prepared(tmp_path_factory.mktemp(name), base, method=method, training=FEW, evaluation={"maxSamples": 0})
        trained, evaluated = train_and_evaluate(run)
        run.progress.close(2)
        made[name] = (publish_as(store, f"1.{number}.0", trained, run), evaluated.metrics["evalLoss"])
    return store, made


def compare(
    root: Path, base: Path, store: MemoryStore, current: CurrentVersion | None, method: str = "lora", **changes: Any
) -> Evaluated:
    fields = {"training": FEW | {"maxSteps": 12}, "method": METHODS[method], "evaluation": OVER_CURRENT} | changes
    run = prepared(root, base, store=store, current=current.model_dump() if current else None, **fields)
    trained, evaluated = train_and_evaluate(run)
    assert not (run.settings.work_dir / "current").exists()
    if method != "full":
        # Only the adapter of the new version is left, and it can be saved.
        assert (list(trained.model.peft_config), trained.model.active_adapter) == (["default"], "default")
        trained.model.save_pretrained(root / "saved")
        assert load_file(root / "saved/adapter_model.safetensors")
    run.progress.close(2)
    return evaluated


@pytest.mark.parametrize("new", METHODS)
@pytest.mark.parametrize("old", METHODS)
def test_the_current_version_has_the_same_loss_as_when_it_was_made(
    base: Path, versions: tuple[MemoryStore, dict[str, Any]], tmp_path: Path, old: str, new: str
) -> None:
    store, made = versions
    current, loss = made[old]
    evaluated = compare(tmp_path, base, store, current, new)
    assert evaluated.metrics["current/evalLoss"] == pytest.approx(loss, rel=1e-3)
    assert evaluated.metrics["evalLoss"] != evaluated.metrics["current/evalLoss"]
    better = evaluated.metrics["evalLoss"] <= evaluated.metrics["current/evalLoss"]
    assert (evaluated.rejected == []) == better


def test_without_a_current_version_the_gate_passes(base: Path, tmp_path: Path) -> None:
    evaluated = compare(tmp_path, base, MemoryStore(), None)
    assert evaluated.rejected == []
    assert "current/evalLoss" not in evaluated.metrics


@pytest.mark.parametrize("what", ["other base", "damaged", "gone", "foreign"])
def test_a_current_version_that_cannot_be_measured_misses_the_gate_with_a_reason(
    base: Path, versions: tuple[MemoryStore, dict[str, Any]], tmp_path: Path, what: str
) -> None:
    store, made = MemoryStore(dict(versions[0].kept)), versions[1]
    current = made["lora"][0]
    weights = "team-a/adapters/colours/1.0.0/adapter_model.safetensors"
    expected = {
        "other base": "1.0.0 belongs to another base model, or to other files of it: large (s3://bucket/models/large). "
        "When the base model changes, use over: base",
        "damaged": "1.0.0 is damaged: adapter_model.safetensors does not match the manifest",
        "gone": "1.0.0 cannot be read",
        "foreign": "the current version's adapter has the peft_type IA3",
    }
    if what == "damaged":
        store.kept[weights] += b"x"
    elif what == "gone":
        store.kept.pop(weights)
    else:
        run = prepared(tmp_path / "again", base, method=METHODS["lora"], training=FEW | {"maxSteps": 1})
        trained, changes = trained_in(run), {}
        run.progress.close(2)
        if what == "foreign":
            trained.model.peft_config["default"].peft_type = "IA3"
        else:
            changes = {"baseModel": {"name": "large", "uri": "s3://bucket/models/large"}}
        current = publish_as(store, "1.0.0", trained, run, **changes)
    evaluated = compare(tmp_path / "run", base, store, current)
    [problem] = evaluated.rejected
    assert problem.startswith("evalLoss cannot be compared with the current version: ")
    assert expected[what] in problem
