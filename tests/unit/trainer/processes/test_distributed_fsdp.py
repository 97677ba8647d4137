"""Weights that are sharded over two ranks, on gloo."""

import json
from pathlib import Path

import pytest
import torch
from graft.contracts.progress import EXIT_CODES, Reason
from safetensors.torch import load_file
from worlds.checkpoints import FolderStore, run_attempt
from worlds.ranks import run_pair

INTERRUPTED, PEER_LOST = EXIT_CODES[Reason.INTERRUPTED], EXIT_CODES[Reason.PEER_LOST]
BF16 = {"sharding": "fsdp", "precision": "bf16", "max_steps": 10, "eval_steps": 5}


def test_an_evaluation_leaves_the_weights_sharded_and_in_float32(tmp_path: Path) -> None:
    # Rank 1 is interrupted within the evaluation of step 5, where no checkpoint was due.
    # The checkpoint is taken after a forward pass of the evaluation.
    asked = run_pair(tmp_path, "asked", measuring={2: [1, "term"]}, **BF16)
    assert asked.codes == [PEER_LOST, INTERRUPTED], asked.log(0) + asked.log(1)
    assert [ref.step for ref in asked.progress.checkpoints or ()] == [4, 5]
    done = run_pair(tmp_path, "done", **BF16)
    assert done.codes == [0, 0], done.log(0) + done.log(1)
    assert done.progress.resumed_from == 5

    whole = run_pair(tmp_path / "whole", "whole", **BF16)
    assert whole.codes == [0, 0], whole.log(0) + whole.log(1)
    seen, expected = (json.loads(path.read_text()) for path in (tmp_path / "done.json", tmp_path / "whole/whole.json"))
    assert seen == expected
    weights, others = load_file(tmp_path / "done.safetensors"), load_file(tmp_path / "whole/whole.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_a_run_resumes_from_a_checkpoint_of_an_evaluated_step(tmp_path: Path) -> None:
    asked = run_pair(tmp_path, "asked", {9: [1, "term"]}, **BF16)
    assert asked.codes == [PEER_LOST, INTERRUPTED], asked.log(0) + asked.log(1)
    done = run_pair(tmp_path, "done", **BF16)
    assert done.codes == [0, 0], done.log(0) + done.log(1)
    assert done.progress.resumed_from == 5
    whole = run_pair(tmp_path / "whole", "whole", **BF16)
    assert whole.codes == [0, 0], whole.log(0) + whole.log(1)
    seen, expected = (json.loads(path.read_text()) for path in (tmp_path / "done.json", tmp_path / "whole/whole.json"))
    assert seen["curve"] == expected["curve"]
    assert seen["evalLosses"] == expected["evalLosses"]


@pytest.mark.parametrize(
    ("t5", "changes"),
    [({"tied": True}, {}), ({"tied": False}, {"gradient_checkpointing": True}), ({"lora": True}, {})],
    ids=["tied", "untied", "lora"],
)
def test_a_t5_with_shared_embeddings_trains_as_in_one_process(
    tmp_path: Path, t5: dict[str, bool], changes: dict[str, bool]
) -> None:
    options = {"t5": t5, "sharding": "fsdp", "max_steps": 7, **changes}
    cut = run_pair(tmp_path, "cut", {9: [1, "term"]}, **options)
    assert cut.codes == [PEER_LOST, INTERRUPTED], cut.log(0)
    done = run_pair(tmp_path, "done", **options)
    assert done.codes == [0, 0], done.log(0)
    assert done.progress.resumed_from == 5
    single = run_attempt(
        tmp_path, FolderStore(tmp_path / "single"), "pod-0", t5=t5, max_steps=7, held_out=5, eval_steps=6
    )
    assert single.learned is not None, single.ended
    seen, weights = json.loads((tmp_path / "done.json").read_text()), load_file(tmp_path / "done.safetensors")
    (seen_loss,), (single_loss,) = seen["evalLosses"], single.learned.held_out_curve
    assert seen_loss["evalLoss"] == pytest.approx(single_loss["evalLoss"], rel=1e-4)
    assert [record["loss"] for record in seen["curve"]] == pytest.approx(
        [record["loss"] for record in single.learned.curve], rel=1e-4
    )
    assert weights.keys() == single.weights.keys()
    for name, expected in single.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)
