"""A run resumes only from a complete and undamaged checkpoint of the same recipe. Old checkpoints are deleted."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from graft.artifacts.store import ObjectInfo
from graft_trainer.checkpoints.checkpoint import complete, identity, pack, unpack
from graft_trainer.checkpoints.host_copy import HostCopy, arrange
from graft_trainer.checkpoints.state import loader, optimizer_state, random_state, restore_optimizer, restore_random
from safetensors import safe_open
from testbed.shell import wait_for
from worlds.checkpoints import RESOLVED, ROOT, FolderStore, Killed, open_attempt, run_attempt
from worlds.trainer import make_job

HALF_OF_RUN = 24  # the micro-batch, in step 13, that kills the run; the checkpoints of steps 8 and 12 exist


def files(store: FolderStore) -> list[str]:
    return [item.key.removeprefix(ROOT) for item in store.objects(ROOT) if "/checkpoints/" in item.key]


def cut(store: FolderStore, name: str, root: Path) -> None:
    run = open_attempt(root, store, name)

    def before_step_12() -> None:
        # If a checkpoint is due while another is uploaded, it waits for a later step.
        wait_for(
            lambda: not any(busy() for busy in run.interruption._holding), 30, "the checkpoint of step 8 is written"
        )

    events: dict[int, str | Callable[[], None]] = {HALF_OF_RUN - 2: before_step_12, HALF_OF_RUN: "kill"}
    assert isinstance(run_attempt(root, store, name, events=events, run=run).ended, Killed)


def test_a_checkpoint_has_receipts_and_safetensors_and_no_pickles(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    cut(store, "pod-1", tmp_path)
    assert files(store) == [
        f"pod-1/checkpoints/step-{step}/rank-0000.{kind}"
        for step in ("000008", "000012")
        for kind in ("json", "safetensors")
    ]
    receipt = json.loads(store.get(f"{ROOT}pod-1/checkpoints/step-000012/rank-0000.json"))
    path = store.folder / f"{ROOT}pod-1/checkpoints/step-000012/rank-0000.safetensors"
    assert receipt["size"] == path.stat().st_size
    assert (receipt["step"], receipt["worldSize"], receipt["rank"]) == (12, 1, 0)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        json.loads(file.metadata()["state"])
    # Only the trained weights, each with AdamW's two moments. The frozen weights are those of the base model.
    weights = {name for name in names if name.startswith("state/weights/")}
    assert weights and all("lora_" in name for name in weights)
    assert len([name for name in names if name.endswith("/exp_avg")]) == len(weights)


@pytest.mark.parametrize("damage", ["no receipt", "shorter", "other bytes"])
def test_a_run_does_not_resume_from_an_incomplete_or_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    store = FolderStore(tmp_path / "store")
    cut(store, "pod-1", tmp_path)
    newest = f"{ROOT}pod-1/checkpoints/step-000012/rank-0000"
    data = store.get(newest + ".safetensors")
    if damage == "no receipt":
        store.delete(newest + ".json")
    elif damage == "shorter":
        store.put(newest + ".safetensors", data[:-1])
    else:
        store.put(newest + ".safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    done = run_attempt(tmp_path, store, "pod-2")
    assert done.ended is None
    assert done.progress.resumed_from == 8


def test_a_run_does_not_resume_from_a_partial_upload(tmp_path: Path) -> None:
    class Cut(FolderStore):
        def upload(self, key: str, path: Path) -> None:
            if "step-000008" not in key:
                return super().upload(key, path)
            self.put(key, path.read_bytes()[:500])  # a partial object, as in a store without atomic writes
            raise OSError("connection reset")

    store = Cut(tmp_path / "store")
    assert isinstance(run_attempt(tmp_path, store, "pod-1", events={20: "kill"}).ended, Killed)
    assert run_attempt(tmp_path, FolderStore(store.folder), "pod-2").progress.resumed_from == 4


def test_the_checkpoint_of_another_recipe_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FolderStore(tmp_path / "store")
    cut(store, "pod-1", tmp_path)
    done = run_attempt(tmp_path, store, "pod-2", learning_rate=0.01, events={4: "kill"})
    assert done.progress.resumed_from is None
    assert "step-000012/ is not used: it belongs to another recipe" in caplog.text


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, True),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "world_size": 2}, True),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_accumulation_steps": 1}, False),
        ({"max_length": 16}, False),
        ({"seed": 8}, False),
    ],
)
def test_which_changes_make_it_another_recipe(changes: dict[str, object], same: bool) -> None:
    job, digests = make_job(), {"train": "sha256:data"}
    changed = dataclasses.replace(RESOLVED, **changes)  # type: ignore[arg-type]
    assert (identity(job, changed, digests, 22) == identity(job, RESOLVED, digests, 22)) is same
    assert identity(job, RESOLVED, {"train": "sha256:other"}, 22) != identity(job, RESOLVED, digests, 22)


def test_a_checkpoint_is_complete_only_with_the_parts_of_all_ranks() -> None:
    parts: dict[str, bytes] = {}
    for rank in range(2):
        name = f"r/a/checkpoints/step-000004/rank-{rank:04d}"
        parts[name + ".safetensors"] = b"x" * (10 + rank)
        parts[name + ".json"] = json.dumps(
            {"step": 4, "rank": rank, "worldSize": 2, "of": "o", "size": 10 + rank, "sha256": "", "createdAt": "t"}
        ).encode()

    def found(keys: list[str]) -> int:
        objects = [ObjectInfo(key, len(parts[key]), "") for key in keys]
        return len(complete(objects, "r/", lambda item: parts[item.key]))

    assert found(list(parts)) == 1
    assert all(found([key for key in parts if key != gone]) == 0 for gone in parts)


def test_only_the_newest_checkpoints_are_kept_and_receipts_are_deleted_first(tmp_path: Path) -> None:
    deleted: list[str] = []

    class Noting(FolderStore):
        def delete(self, key: str) -> None:
            deleted.append(key.removeprefix(ROOT))
            super().delete(key)

    store = Noting(tmp_path / "store")
    done = run_attempt(tmp_path, store, "pod-1", save_steps=3)
    assert [(ref.attempt, ref.step) for ref in done.progress.checkpoints or ()] == [("pod-1", 15), ("pod-1", 18)]
    assert {name.split("/")[2] for name in files(store)} == {"step-000015", "step-000018-final"}
    assert deleted[:2] == [f"pod-1/checkpoints/step-000003/rank-0000.{kind}" for kind in ("json", "safetensors")]


def test_two_attempts_at_the_same_time_do_not_break_each_others_checkpoints(tmp_path: Path) -> None:
    # pod-1 has lost the cluster but still reaches the store. pod-2 replaces it while pod-1 still trains.
    store = FolderStore(tmp_path / "store")
    inside: list[object] = []

    def another() -> None:
        def in_thread() -> None:
            inside.append(run_attempt(tmp_path, store, "pod-2", events={12: "kill"}, save_steps=2))

        with torch.random.fork_rng():  # two processes would each have their own generator
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()

    first = run_attempt(tmp_path, store, "pod-1", events={14: another})
    second = inside[0]
    assert isinstance(second.ended, Killed), second.ended  # type: ignore[attr-defined]
    assert second.progress.resumed_from == 4  # type: ignore[attr-defined]
    undisturbed = run_attempt(tmp_path, FolderStore(tmp_path / "other"), "pod-1")
    assert first.learned is not None and undisturbed.learned is not None, first.ended
    assert first.learned.curve == undisturbed.learned.curve
    for key in files(store):
        attempt, _, folder, name = key.split("/")
        if name.endswith(".json"):
            assert key.replace(".json", ".safetensors") in files(store), (attempt, folder)
    third = run_attempt(tmp_path, store, "pod-3", events={1: "kill"})
    assert third.ended is None and third.progress.resumed_from == 18


def test_the_state_of_an_optimizer_keeps_its_dtypes() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3).bfloat16()
        return layer, torch.optim.SGD(layer.parameters(), lr=0.1)

    _, first = make()
    for parameter in first.param_groups[0]["params"]:
        first.state[parameter] = {"step": 3, "wide": torch.full((2,), 1 / 3), "bytes": torch.ones(2, dtype=torch.uint8)}
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(optimizer_state(first), "o", tensors)))
    _, second = make()
    restore_optimizer(second, unpack(packed, loader(tensors.__getitem__, torch.device("cpu"))))
    for parameter in second.param_groups[0]["params"]:
        assert second.state[parameter]["wide"].dtype == torch.float32
        assert torch.equal(second.state[parameter]["wide"], torch.full((2,), 1 / 3))
        assert second.state[parameter]["bytes"].dtype == torch.uint8


def test_all_random_generators_resume_from_their_saved_state() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    random.gauss(0, 1)
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(random_state(), "r", tensors)))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = draw()
    restore_random(unpack(packed, loader(tensors.__getitem__, torch.device("cpu"))))
    assert draw() == expected


def test_the_error_names_a_value_that_a_checkpoint_cannot_hold() -> None:
    with pytest.raises(TypeError, match="cannot hold state/a/0, a object"):
        pack({"a": [object()]}, "state", {})


def test_buffers_share_pieces_of_memory_and_do_not_overlap() -> None:
    places, sizes = arrange({"a": 100, "b": 4, "c": 900, "big": 5000, "none": 0, "d": 1}, piece=1024)
    assert places == {"a": (0, 0), "b": (0, 128), "c": (1, 0), "big": (2, 0), "none": (3, 0), "d": (3, 0)}
    assert sizes == [192, 960, 5056, 64]


def test_a_host_copy_equals_its_source_and_reuses_its_buffers() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = HostCopy()
    tensors = {
        "weights": torch.arange(6, dtype=torch.float32, device=device).view(2, 3),
        "step": torch.tensor(7.0, device=device),
        "half": torch.ones(3, dtype=torch.bfloat16, device=device),
        "random": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.empty(0, device=device),
    }
    copy.reserve(tensors)
    first = copy(tensors)
    assert all(one.device.type == "cpu" and one.equal(tensors[name].cpu()) for name, one in first.items())
    assert first["weights"].is_pinned() == (device == "cuda")
    where = {name: one.data_ptr() for name, one in first.items()}
    tensors["weights"].add_(1)
    second = copy(tensors)
    assert second["weights"].equal(tensors["weights"].cpu())
    assert {name: one.data_ptr() for name, one in second.items()} == where
    # The final checkpoint has only the weights and reuses their buffers. Another state gets buffers of its own shape.
    assert copy({"weights": tensors["weights"]}).keys() == {"weights"}
    assert copy({"weights": tensors["weights"]})["weights"].data_ptr() == where["weights"]
    assert copy({"weights": torch.ones(4, device=device)})["weights"].shape == (4,)


def test_buffers_are_reserved_in_the_background_and_a_failure_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[str, int]] = []
    reserve = HostCopy.reserve

    def seen(copy: HostCopy, tensors: dict[str, torch.Tensor]) -> None:
        made.append((threading.current_thread().name, len(tensors)))
        if len(made) == 1:
            raise MemoryError("none is left")
        reserve(copy, tensors)

    monkeypatch.setattr(HostCopy, "reserve", seen)
    attempt = run_attempt(tmp_path, FolderStore(tmp_path / "store"), "pod-1")
    assert attempt.ended is None and "none is left" in caplog.text
    ahead, first, *_ = made
    assert ahead == ("checkpoint", first[1])  # in the background, and with the optimizer's state
    assert {thread for thread, _ in made[1:]} == {"MainThread"}
