"""A version is loaded from a plain copy of its folder with peft and transformers alone, and answers as the trained model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_trainer.evaluation.evaluate import evaluate
from graft_trainer.versions.publish import publish
from graft_trainer.versions.tokenizer import LARGEST, add_tokenizer
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds.composition import composed, download, make_adapter, publish_adapter
from worlds.trainer import MemoryStore, make_base, make_job, make_t5, question_lines, ready, train_prepared

QUESTION = [{"role": "user", "content": "What colour is the sky?"}]
FAST = {"maxSteps": 8, "loggingSteps": 4, "perDeviceTrainBatchSize": 8, "learningRate": 0.02}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.usefixtures("quick")


def trained_and_downloaded(root: Path, base: Path, **changes: Any) -> tuple[Any, Any, Path]:
    """Train and publish. Return the trained model, its tokenizer and the folder with a copy of the version."""
    data = {"team-a/data/train.jsonl": question_lines(24), "team-a/data/eval.jsonl": question_lines(6)}
    changes = {"dataset": {"format": "instruction"}} | changes
    changes["dataset"] = changes["dataset"] | {
        "train": {"uri": "s3://bucket/team-a/data/train.jsonl"},
        "eval": {"uri": "s3://bucket/team-a/data/eval.jsonl"},
    }
    run, store = ready(root / "run", base, make_job(training=FAST, **changes), MemoryStore(data))
    trained = train_prepared(run)
    publish(run, trained, evaluate(run, trained))
    return trained.model, trained.tokenizer, download(store, root / "colours-1.0.0", "colours")


def beside(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the base model beside the version, as the card says, and go there."""
    shutil.copytree(base, folder.parent / "tiny")
    monkeypatch.chdir(folder.parent)


def answers(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [{"lora": {"rank": 4}}, {"promptTuning": {"virtualTokens": 4}}], ids=str)
def test_an_adapter_loads_from_its_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    model, tokenizer, folder = trained_and_downloaded(tmp_path, base, method=method)
    beside(folder, base, monkeypatch)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder.name).eval()
    own = AutoTokenizer.from_pretrained(folder.name)
    prompt = own.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = own(prompt, return_tensors="pt", add_special_tokens=False)
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = answers(model, **asked)
    assert torch.allclose(answers(loaded, **asked), expected, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    width = asked["input_ids"].shape[1]
    assert not torch.allclose(answers(plain, **asked), expected[:, -width:], atol=1e-2), (
        "the adapter must have an effect"
    )


def test_an_adapter_of_a_seq2seq_model_loads_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_t5(tmp_path / "base")
    model, _, folder = trained_and_downloaded(tmp_path, base, task="seq2seq")
    beside(folder, base, monkeypatch)
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(folder.name).eval()
    asked = dict(AutoTokenizer.from_pretrained(folder.name)("And snow?", return_tensors="pt"))
    asked = {"input_ids": asked["input_ids"], "decoder_input_ids": torch.tensor([[0, 5, 9]])}
    assert torch.allclose(answers(loaded, **asked), answers(model, **asked), atol=1e-4)


def test_the_template_of_the_prompts_is_the_chat_template(base: Path, tmp_path: Path) -> None:
    dataset = {"format": "instruction", "templates": ["Q: {instruction}\nA:"]}
    _, _, folder = trained_and_downloaded(tmp_path, base, dataset=dataset)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == "Q: What colour is the sky?\nA:"
    assert "Q: {instruction}" in (folder / "README.md").read_text()


def test_a_base_of_the_hub_is_named_as_peft_names_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}  # it names code to run
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    reference = {"name": "tiny", "uri": f"hf://org/model@{COMMIT}", "license": "apache-2.0"}
    _, _, folder = trained_and_downloaded(tmp_path, base, baseModel=reference)
    found = PeftConfig.from_pretrained(folder)
    assert (found.base_model_name_or_path, found.revision) == ("org/model", COMMIT)
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["graft", "lora"],
    }
    assert f"vllm serve org/model --revision {COMMIT} --enable-lora" in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| `exactMatch`"))
    assert row.endswith("| 6 |") and " to " in row


def test_a_combined_version_loads_from_its_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    store.add_folder("models/tiny/", base)
    parents = [publish_adapter(store, make_adapter(base, tmp_path / f"{n}", n), f"1.0.{n}") for n in (1, 2)]
    composed(tmp_path / "run", store, parents)
    folder = download(store, tmp_path / "both-1.0.0")
    beside(folder, base, monkeypatch)
    inputs = AutoTokenizer.from_pretrained(folder)("White it is.", return_tensors="pt")["input_ids"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder.name).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(answers(loaded, input_ids=inputs), answers(plain, input_ids=inputs), atol=1e-2)
    assert "`part 1.0.1` x 1, `part 1.0.2` x 1 by `cat`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("has_config", [True, False])
def test_a_tokenizer_that_relies_on_config_json_loads_without_it(tmp_path: Path, has_config: bool) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    if not has_config:
        (base / "tokenizer_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    (folder := tmp_path / "version").mkdir()
    add_tokenizer(base, folder, tokenizer, None)
    text = "What colour is grass?"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_is_too_large_is_left_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with (base / "tokenizer.json").open("ab") as stream:
        stream.truncate(LARGEST + 1)
    (folder := tmp_path / "version").mkdir()
    add_tokenizer(base, folder, None, None)
    assert list(folder.iterdir()) == []
