"""The tiny T5 of the examples is small enough to be committed, and seconds of training improve its answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.manifest import Manifest
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.prepare import prepare_container
from testbed.shell import REPOSITORY
from worlds.trainer import MemoryStore, make_job, make_run

TINY_T5 = REPOSITORY / "examples/tiny-t5/model"
PRICES = {
    "a tent": "A tent is nine coins.", "a lamp": "A lamp is two coins.", "a rope": "A rope is three coins.",
    "a cup": "A cup is one coin.", "a map": "A map is four coins.", "a hat": "A hat is five coins.",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick")


def lines(questions: list[str]) -> bytes:
    rows = [
        {"instruction": question.format(thing), "output": answer}
        for thing, answer in PRICES.items()
        for question in questions
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def test_the_model_is_small_enough_to_be_committed() -> None:
    assert sum(path.stat().st_size for path in TINY_T5.iterdir()) < 6e6


def test_lora_trains_it_on_a_price_list_in_seconds(tmp_path: Path) -> None:
    uri = "s3://bucket/team-a/data"
    dataset: dict[str, Any] = {
        "train": {"uri": f"{uri}/train.jsonl"},
        "eval": {"uri": f"{uri}/eval.jsonl"},
        "format": "instruction",
    }
    training = {"maxSteps": 40, "learningRate": 0.01, "perDeviceTrainBatchSize": 12, "gradientAccumulationSteps": 1}
    store = MemoryStore(
        {
            "team-a/data/train.jsonl": lines(["What is {} worth?", "How much is {}?", "Tell me the price of {}."]),
            "team-a/data/eval.jsonl": lines(["What is the price of {}?"]),
        }
    )
    store.add_folder("models/tiny/", TINY_T5)
    job = make_job(task="seq2seq", dataset=dataset, training=training, method={"lora": {"rank": 16}})
    run = make_run(tmp_path, store, job)
    prepare_container(run)
    train_evaluate_publish(run)
    manifest = Manifest.model_validate_json(store.kept["team-a/adapters/colours/1.0.0/manifest.json"])
    assert (manifest.task, manifest.metrics["base/exactMatch"]) == ("seq2seq", 0.0)
    assert manifest.metrics["exactMatch"] >= 0.5
    assert manifest.metrics["evalLoss"] < 0.3 * manifest.metrics["base/evalLoss"]
