"""Two ranks on gloo train as one process does, end together, and resume together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.job import Pods
from graft.contracts.progress import EXIT_CODES, Reason, Termination
from graft_trainer import train as train_module
from graft_trainer.data.data_order import DataOrder
from graft_trainer.model.model import load_base_model
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.processes import distributed, launch
from graft_trainer.processes.launch import End, worst
from graft_trainer.recipe.resolve import Device, limits
from graft_trainer.run.failures import connection_ended
from graft_trainer.run.interruption import Interruption
from safetensors.torch import load_file
from worlds.checkpoints import Attempt, FolderStore, run_attempt
from worlds.ranks import HALF, run_pair, start
from worlds.trainer import make_base, make_job, make_qwen, make_t5, ready

INTERRUPTED, PEER_LOST = EXIT_CODES[Reason.INTERRUPTED], EXIT_CODES[Reason.PEER_LOST]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    root = tmp_path_factory.mktemp("single")
    done = run_attempt(root, FolderStore(root / "store"), "pod-0", full=True, held_out=5, eval_steps=6)
    assert done.learned is not None, done.ended
    return done


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_interrupted_ranks_train_like_one_undisturbed_process(
    tmp_path: Path, single: Attempt, sharding: str
) -> None:
    # Rank 1 is interrupted: both ranks save the same step, and the progress names the cause.
    asked = run_pair(tmp_path, "asked", {9: [1, "term"]}, sharding=sharding)
    assert asked.codes == [PEER_LOST, INTERRUPTED], asked.log(0) + asked.log(1)
    assert [ref.step for ref in asked.progress.checkpoints or ()] == [4, 5]
    assert asked.progress.failure is not None and "was interrupted" in asked.progress.failure.message

    # Rank 1 is killed in the second half of a step: rank 0 ends soon after.
    lost = run_pair(tmp_path, "lost", {12: [1, "kill"]}, sharding=sharding)
    assert lost.codes == [PEER_LOST, -signal.SIGKILL], lost.log(0)
    assert lost.seconds_between < 15
    assert lost.progress.resumed_from == 5
    told = Termination.model_validate_json((tmp_path / "lost/termination").read_text())
    assert told.message.startswith("Another pod of the run ended")

    done = run_pair(tmp_path, "done", sharding=sharding)
    assert done.codes == [0, 0], done.log(0) + done.log(1)
    assert done.progress.resumed_from == 8
    seen = json.loads((tmp_path / "done.json").read_text())
    assert single.learned is not None
    assert seen["tokens"] == single.learned.tokens
    assert losses(seen["evalLosses"]) == pytest.approx(losses(single.learned.held_out_curve), rel=1e-4)
    assert len(seen["evalLosses"]) == 2
    assert [record["loss"] for record in seen["curve"]] == pytest.approx(
        [record["loss"] for record in single.learned.curve], rel=1e-4
    )
    weights = load_file(tmp_path / "done.safetensors")
    assert weights.keys() == single.weights.keys()
    for name, expected in single.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)

    # Rank 0 alone writes the final checkpoint, and rank 0 alone can resume from it.
    last = (done.progress.checkpoints or [])[-1]
    assert (last.step, last.attempt) == (18, "done")
    again = run_pair_alone(tmp_path, "again", sharding)
    assert again == 0
    assert json.loads((tmp_path / "again.json").read_text())["curve"] == seen["curve"]


def losses(curve: list[dict[str, float]]) -> list[float]:
    return [record["evalLoss"] for record in curve]


def run_pair_alone(root: Path, name: str, sharding: str) -> int | None:
    """Run rank 0 of two without rank 1. Return its exit code."""
    process = start(root / "store", root, name, 0, 2, 0, HALF | {"sharding": sharding, "alone": True})
    process.join(240)
    return process.exitcode


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_an_adapter_resumes_on_all_ranks_with_the_same_losses(tmp_path: Path, sharding: str) -> None:
    options = {"full": False, "sharding": sharding, "max_steps": 4}
    assert run_pair(tmp_path, "cut", {5: [0, "term"]}, **options).codes == [INTERRUPTED, PEER_LOST]
    resumed = run_pair(tmp_path, "resumed", **options)
    assert resumed.codes == [0, 0]
    whole = run_pair(tmp_path / "whole", "whole", **options, gradient_checkpointing=True)
    assert whole.codes == [0, 0], whole.log(0)
    # The adapter has dropout. Equal curves show that the random generators of both ranks have resumed, and that
    # recomputed activations are the same.
    one, other = (
        json.loads(path.read_text())["curve"] for path in (tmp_path / "resumed.json", tmp_path / "whole/whole.json")
    )
    assert one == other


def test_a_rank_that_fails_in_the_first_step_reports_it_and_the_other_reports_peer_lost(tmp_path: Path) -> None:
    options = {"full": False, "sharding": "ddp", "max_steps": 4}
    out_of_memory = EXIT_CODES[Reason.OUT_OF_MEMORY]
    assert run_pair(tmp_path, "second", {1: [1, "memory"]}, **options).codes == [PEER_LOST, out_of_memory]
    assert run_pair(tmp_path, "first", {1: [0, "memory"]}, **options).codes == [out_of_memory, PEER_LOST]

    # If a rank is killed before the first step is done, the cause may also be the network.
    silent = run_pair(tmp_path, "silent", {1: [1, "kill"]}, **options)
    assert silent.codes == [EXIT_CODES[Reason.COMMUNICATION_FAILED], -signal.SIGKILL], silent.log(0)


def test_the_ranks_wait_for_a_rank_that_loads_slowly(tmp_path: Path) -> None:
    options = {"full": False, "sharding": "ddp", "max_steps": 2}
    for who in (0, 1):
        pair = run_pair(tmp_path, f"late-{who}", {}, **options, silence=4, late=(who, 8, None))
        assert pair.codes == [0, 0], pair.log(0) + pair.log(1)

    never = run_pair(tmp_path, "never", {}, **options, loading=2, late=(1, 6, None))
    assert never.codes[0] == EXIT_CODES[Reason.COMMUNICATION_FAILED], never.log(0)
    assert "1 of 2 processes had loaded" in never.log(0)
    # Rank 0 does not wait for a rank that fails while it loads.
    ended = run_pair(tmp_path, "ended", {}, **options, late=(1, 1, "memory"))
    assert ended.codes == [PEER_LOST, EXIT_CODES[Reason.OUT_OF_MEMORY]], ended.log(0)


def test_a_rank_whose_peers_never_connect_ends_with_peers_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(tmp_path / "store", tmp_path, "waits", 0, 2, port, HALF | {"arrival": 0.5})
    process.join(60)
    assert process.exitcode == EXIT_CODES[Reason.PEERS_MISSING], (tmp_path / "waits-0.log").read_text()
    told = Termination.model_validate_json((tmp_path / "waits/termination").read_text())
    assert "1 of 2 processes connected" in told.message and "spec.queue" in told.remedy

    process = start(tmp_path / "store", tmp_path, "alone", 1, 2, port, HALF | {"arrival": 0.5})
    process.join(60)
    assert process.exitcode == EXIT_CODES[Reason.PEERS_MISSING], (tmp_path / "alone-1.log").read_text()


@pytest.mark.parametrize(
    ("method", "make", "checkpointing"),
    [
        ({"full": {}}, make_base, False),
        ({"lora": {"rank": 4}}, make_base, True),
        ({"lora": {"rank": 4, "bias": "all", "targetModules": "all-linear+embeddings"}}, make_qwen, False),
        ({"promptTuning": {"virtualTokens": 4}}, make_base, False),
    ],
    ids=["full", "lora", "lora with biases and embeddings", "promptTuning"],
)
def test_fsdp_publishes_the_same_version_as_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, make: Any, checkpointing: bool
) -> None:
    monkeypatch.setattr(train_module, "cpu_limit", lambda: 1)
    base = make(tmp_path / "base")
    training = {
        "maxSteps": 4, "loggingSteps": 1, "evalSteps": 2, "learningRate": 0.01, "sharding": "fsdp",
        "gradientAccumulationSteps": 2, "gradientCheckpointing": checkpointing,
    }  # fmt: skip
    changes = {"method": method, "evaluation": {"maxSamples": 2, "maxNewTokens": 4}}
    run, _ = ready(tmp_path / "alone", base, make_job(training=training | {"perDeviceTrainBatchSize": 2}, **changes))
    with run.cleanup:
        train_evaluate_publish(run)
    alone = json.loads((run.settings.adapter_dir / "report.json").read_text())

    pair = run_pair(tmp_path, "pair", base=base, job=changes | {"training": training | {"perDeviceTrainBatchSize": 1}})
    assert pair.codes == [0, 0], pair.log(0) + pair.log(1)
    seen = json.loads((tmp_path / "pair.json").read_text())
    # When the model is placed for the evaluation, its weights are saved and memory holds no objects of the training.
    assert seen["left"] == {"final": 1, "shards": 0, "optimizers": 0, "trainers": 0}
    assert seen["curve"] == [pytest.approx(record, rel=1e-3) for record in alone["lossCurve"]]
    assert seen["metrics"] == pytest.approx(alone["metrics"], rel=1e-3)
    for path in run.settings.adapter_dir.glob("*.safetensors"):
        weights, expected = load_file(tmp_path / "pair-0/work/adapter" / path.name), load_file(path)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [make_base, make_t5])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_rank_0_loads_the_weights_of_a_sharded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, method: str
) -> None:
    folder, task = make(tmp_path), "seq2seq" if make is make_t5 else "causal"
    job = make_job(task=task, method={method: {}}, training={"sharding": "fsdp", "precision": "bf16"})
    known = limits(job, Device("cpu"), 128, 2)
    monkeypatch.setattr(distributed, "joined", lambda: True)
    models = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        base = load_base_model(folder, "tiny", task, job.method, known, Device("cpu"))
        assert base.loaded == (rank == 0)
        models.append(base.model)
    first, second = (
        [(name, value.shape, value.dtype, value.device) for name, value in (*m.named_parameters(), *m.named_buffers())]
        for m in models
    )
    # Both ranks need the same tensors, including shared ones. Otherwise rank 0 could not distribute the weights.
    assert first == second


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_step_has_the_same_examples_for_any_world_size_and_micro_batch(world: int, batch: int) -> None:
    examples, effective = 53, 24
    whole = DataOrder(examples, effective, 1, seed=5)
    parts = [DataOrder(examples, batch, effective // (batch * world), 5, rank, world) for rank in range(world)]
    for epoch in range(2):
        for order in (whole, *parts):
            order.set_epoch(epoch)
        dealt = [list(part) for part in parts]
        assert {len(batches) for batches in dealt} == {len(part) for part in parts} and len(
            {len(p) for p in parts}
        ) == 1
        per_step = effective // (batch * world)
        for number, step in enumerate(whole):
            mine = [batches[number * per_step : (number + 1) * per_step] for batches in dealt]
            assert sorted(index for part in mine for micro in part for index in micro) == sorted(step)


def test_the_data_order_is_that_of_accelerate() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(30), data_seed=5)
    order = DataOrder(30, 4, 1, seed=5)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order.set_epoch(epoch)
        assert [index for batch in order for index in batch] == list(sampler)


def test_the_environment_variables_give_the_rank_of_a_process() -> None:
    assert distributed.variables(Pods(), {}) == {}
    pods = Pods(nodes=2, processes_per_node=4, first_host="run-0.peers.team-a.svc")
    values = distributed.variables(pods, {"JOB_COMPLETION_INDEX": "1"}, local=2)
    assert values == {
        "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "run-0.peers.team-a.svc", "MASTER_PORT": "29500",
    }  # fmt: skip
    alone = distributed.variables(Pods(processes_per_node=2), {}, local=1)
    assert (alone["MASTER_ADDR"], alone["RANK"]) == ("127.0.0.1", "1")


def told(reason: Reason) -> Termination:
    return Termination(reason=reason, message=str(reason), remedy="Do this.")


def lost() -> End:
    return End(PEER_LOST, told(Reason.PEER_LOST))


@pytest.mark.parametrize(
    ("ends", "code", "reason"),
    [
        ([End(0, None), End(0, None)], 0, None),
        ([lost(), End(14, told(Reason.CONFIGURATION_INVALID))], 14, Reason.CONFIGURATION_INVALID),
        ([lost(), End(31, told(Reason.INTERRUPTED))], 31, Reason.INTERRUPTED),
        ([lost(), End(20, told(Reason.MEMORY_EXCEEDED))], 20, Reason.MEMORY_EXCEEDED),
        ([End(32, told(Reason.COMMUNICATION_FAILED)), End(31, told(Reason.INTERRUPTED))], 31, Reason.INTERRUPTED),
        ([lost(), End(32, told(Reason.COMMUNICATION_FAILED))], 32, Reason.COMMUNICATION_FAILED),
        # A SIGKILL by the kernel means that memory ran out, whichever process ended first.
        ([End(-9, None), lost()], 20, Reason.MEMORY_EXCEEDED),
        ([End(-9, None), End(32, told(Reason.COMMUNICATION_FAILED))], 20, Reason.MEMORY_EXCEEDED),
        ([lost(), End(-9, None)], 20, Reason.MEMORY_EXCEEDED),
        # A SIGKILL by the launcher does not.
        ([lost(), End(-9, None, by_launcher=True)], 21, Reason.PEER_LOST),
        ([End(-6, None), End(-9, None, by_launcher=True)], 1, Reason.INTERNAL_ERROR),
        # torch's watchdog aborts ranks that wait on their GPU for a rank that has ended.
        ([lost(), End(-6, None)], 21, Reason.PEER_LOST),
        ([End(-9, None), End(-6, None)], 20, Reason.MEMORY_EXCEEDED),
        ([End(-6, None), End(20, told(Reason.MEMORY_EXCEEDED))], 20, Reason.MEMORY_EXCEEDED),
        # A rank that was aborted before any other rank failed is itself the cause.
        ([End(-6, None), lost()], 1, Reason.INTERNAL_ERROR),
        ([End(-6, None), End(-6, None)], 1, Reason.INTERNAL_ERROR),
    ],
)
def test_of_several_processes_the_one_that_caused_the_failure_is_reported(
    ends: list[End], code: int, reason: Reason | None
) -> None:
    found, why = worst(ends)
    assert (found, why.reason if why else None) == (code, reason)


def test_a_process_that_the_launcher_kills_is_not_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LONGEST", 0.3)
    files = [tmp_path / "0", tmp_path / "1"]
    files[0].write_text(told(Reason.PEER_LOST).json_text())
    files[1].touch()
    ended = [f"import sys; sys.exit({PEER_LOST})", "import time; time.sleep(60)"]
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in ended]
    ends = launch._wait(processes, files, Interruption())
    assert [(end.code, end.by_launcher) for end in ends] == [(PEER_LOST, False), (-signal.SIGKILL, True)]
    assert worst(ends)[0] == PEER_LOST


def test_an_nccl_error_ends_a_process_that_waits_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def give_up(error: BaseException) -> int:
        said.append(str(error))
        return 7

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    group = distributed.Group()
    group.control, group.give_up = object(), give_up
    monkeypatch.setattr(distributed, "_group", group)
    monkeypatch.setattr(distributed, "RAISING", 0.01)
    monkeypatch.setattr(os, "_exit", end)
    states = iter(["SUCCESS", "COMM_ERROR"])
    with pytest.raises(Ended, match="7"):
        distributed._watch_nccl(lambda: next(states))
    assert connection_ended(RuntimeError(said[0]))
    with pytest.raises(Ended, match="7"):
        distributed._watch_nccl(lambda: "TIMEOUT")
    assert not connection_ended(RuntimeError(said[1]))
    group.control = None  # training is over
    distributed._watch_nccl(lambda: "TIMEOUT")
    assert len(said) == 2
