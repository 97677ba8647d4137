"""README.md of a version: the metadata of the Hub, and words of tenants that stay words."""

import re
from typing import Any

import pytest
import yaml
from graft.artifacts.adapterconfig import base_reference
from graft.artifacts.manifest import Manifest
from graft.report.card import render_card
from worlds.report import make_report

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = {"size": 1, "sha256": "0" * 64}
ATTACK = "x`|``\n---\nlicense: mit\n# owned <script>alert(1)</script> [a](javascript:b) {{ 7 * 7 }} ```\u2028"


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "adapter": "support",
        "version": "1.2.0",
        "method": "lora",
        "baseModel": {"name": "tiny", "uri": "s3://bucket/models/tiny", "digest": "sha256:base"},
        "job": {"name": "tune", "namespace": "shop", "uid": "u", "attempt": "a"},
        "recipe": "sha256:r",
        "hyperparameters": {"rank": 8, "learningRate": 2e-4},
        "datasets": {"train": "sha256:train"},
        "metrics": {"exactMatch": 0.81},
        "rank": 8,
        "targetModules": ["q_proj"],
        "files": [{"name": name, **FILE} for name in ("adapter_config.json", "adapter_model.safetensors")],
        "createdAt": "2026-01-02T03:04:05Z",
    }
    return Manifest.model_validate(fields | changes)


def metadata(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (f"hf://org/model@{COMMIT}", ("org/model", COMMIT)),
        ("s3://bucket/models/gpt2", ("./gpt2", None)),  # gpt2 alone would be a repository of the Hub
        ("pvc://claim/path", ("./gpt2", None)),
        ("hf://org/model@main", ("./gpt2", None)),
    ],
)
def test_the_base_model_is_named_as_peft_reads_it(uri: str, expected: tuple[str, str | None]) -> None:
    assert base_reference("gpt2", uri) == expected


def test_the_metadata_is_that_of_the_hub() -> None:
    of_hub = manifest(baseModel={"name": "tiny", "uri": f"hf://org/model@{COMMIT}"})
    data = ["hf://datasets/org/talks@main/train.jsonl", "s3://bucket/shop/eval.jsonl"]
    assert metadata(render_card(of_hub, license_="apache-2.0", datasets=data)) == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["graft", "lora"],
        "datasets": ["org/talks"],
    }


def test_a_licence_that_the_hub_does_not_know_is_other() -> None:
    found = metadata(render_card(manifest(), license_="Our own terms, 2026"))
    assert (found["license"], found["license_name"]) == ("other", "Our own terms, 2026")
    assert "license" not in metadata(card := render_card(manifest()))
    assert "not known. Check it before you share this version" in card
    assert "base_model" not in metadata(card)  # it is in a bucket, so no name of the Hub is right


def test_scores_have_their_n_and_interval() -> None:
    report = make_report(precision={"exactMatch": {"n": 100}, "faq/f1": {"n": 40, "standardError": 0.05}})
    card = render_card(manifest(), report=report)
    rows = {line.split(" | ")[0].strip("| `"): line for line in card.splitlines() if line.startswith("| `")}
    assert "81 % (72.2 to 87.5 %)" in rows["exactMatch"] and rows["exactMatch"].endswith("| 100 |")
    assert "60 % (50.2 to 69.8 %)" in rows["faq/f1"] and rows["faq/f1"].endswith("| 40 |")


def test_how_to_load_a_multimodal_model() -> None:
    card = render_card(manifest(), auto_class="AutoModelForImageTextToText")
    assert 'base = AutoModelForImageTextToText.from_pretrained("./tiny")' in card
    assert 'model = PeftModel.from_pretrained(base, "support-1.2.0")' in card


def test_a_tuned_prompt_is_not_served_by_vllm() -> None:
    card = render_card(manifest(method="promptTuning", rank=None))
    assert "vllm" not in card and "AutoPeftModelForCausalLM" in card


def outside_of_code(card: str) -> str:
    """Return what Markdown reads as Markdown: the text without metadata, fenced blocks and code spans."""
    _, _, text = card.split("---\n", 2)
    text = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)


def test_words_of_tenants_are_neither_yaml_nor_markdown_nor_html() -> None:
    bad = manifest(
        rejected=[ATTACK],
        promptTemplate=ATTACK,
        targetModules=[ATTACK],
        hyperparameters={"rank": ATTACK},
        datasets={"train": ATTACK},
        baseModel={"name": "tiny", "uri": ATTACK, "digest": ATTACK},
        importedFrom=ATTACK,
    )
    report = make_report(metrics={f"{ATTACK}/exactMatch": 0.5})
    card = render_card(bad, license_=ATTACK, report=report, datasets=[f"hf://datasets/org/{ATTACK}/y"])
    found = metadata(card)
    assert found["license"] == "other" and set(found) == {
        "library_name",
        "license",
        "license_name",
        "pipeline_tag",
        "tags",
    }
    assert all(char.isprintable() for char in found["license_name"])
    plain = outside_of_code(card)
    for word in ("script", "owned", "javascript", "7 * 7", "mit"):
        assert word not in plain, plain
    for line in card.splitlines():  # a | in a word adds no column
        if line.startswith("| `rank`"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_a_card_has_a_limited_size() -> None:
    metrics = {f"suite-{n}/exactMatch": 0.5 for n in range(400)}
    card = render_card(manifest(metrics=metrics, targetModules=["m" * 200] * 500), report=make_report(metrics=metrics))
    assert len(card) < 32 * 1024 and "And 336 more." in card
