"""The generated CRDs: the committed files match the models, and they have the form that the API server accepts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from graft import crdgen
from graft.status import REASONS

CRDS = {module.CRD["kind"]: crdgen.custom_resource_definition(module) for module in crdgen.KINDS}
INTEGER_FORMATS = {"int32", "int64"}
# What a number counts or measures. A number without a unit is named for what it is: a factor, a share, a rate.
UNITS = re.compile(
    r"\b([Nn]umber|[Ss]econds?|tokens?|percent|[Ss]teps?|[Ee]xamples|lines|[Mm]icro-batch(es)?|[Rr]equests|times|places|value"
    r"|Share|[Ss]cale|Factor|Rank|rank|probability|rate|decay|norm|term|Seed|Weight|[Ww]idth|metric)\b"
)
KEYWORDS = {
    "additionalProperties",
    "default",
    "description",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "properties",
    "required",
    "type",
}


def schema(kind: str) -> dict[str, Any]:
    return CRDS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]  # type: ignore[no-any-return]


def at(kind: str, path: str) -> dict[str, Any]:
    node = schema(kind)
    for name in path.split("."):
        node = node["properties"][name]
    return node


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema inside a schema, with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if word in node:
            yield from nodes(node[word], f"{path}[]")


def test_the_committed_files_match_the_models() -> None:
    assert crdgen.differences(crdgen.ROOT) == "", "the committed files are outdated. Run `python -m graft.crdgen`"


def test_check_shows_the_differences(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(crdgen, "ROOT", tmp_path)
    assert crdgen.main([]) == 0
    assert crdgen.main(["--check"]) == 0
    edited = tmp_path / "crds" / "finetunejobs.graft.dev.yaml"
    edited.write_text(edited.read_text().replace("maximum: 512", "maximum: 1024"))
    (tmp_path / "crds" / "old.graft.dev.yaml").write_text("{}")
    capsys.readouterr()

    assert crdgen.main(["--check"]) == 1

    shown = capsys.readouterr().out
    assert re.search(r"^- +maximum: 1024$", shown, re.M) and re.search(r"^\+ +maximum: 512$", shown, re.M)
    assert "old.graft.dev.yaml" in shown


def test_the_charts_copies_equal_the_crds() -> None:
    originals, copies = (
        {path.name: path.read_text() for path in (crdgen.ROOT / folder).iterdir()} for folder in crdgen.CRD_DIRS
    )
    assert originals == copies
    assert {yaml.safe_load(text)["spec"]["names"]["kind"] for text in originals.values()} == set(CRDS)


@pytest.mark.parametrize("kind", CRDS)
def test_every_field_is_described(kind: str) -> None:
    bare = [
        f"{path}.{name}"
        for path, node in nodes(schema(kind))
        for name, child in node.get("properties", {}).items()
        if not child.get("description") and f"{path}.{name}" not in {".apiVersion", ".kind", ".metadata"}
    ]
    assert bare == []


@pytest.mark.parametrize("kind", CRDS)
def test_the_description_of_a_field_names_its_default_and_its_limits(kind: str) -> None:
    """`kubectl explain` shows nothing else of them."""
    named = 0
    for path, node in nodes(at(kind, "spec"), "spec"):
        facts = [node.get(word) for word in ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")]
        facts += [node.get("maxProperties"), node.get("default") or None]
        for fact in facts:
            if fact is not None and "description" in node:
                text = json.dumps(fact).strip('"')
                assert re.search(rf"(^|\W){re.escape(text)}(\W|$)", node["description"]), f"{kind} {path}: {text}"
                named += 1
    assert named > 3


@pytest.mark.parametrize("kind", CRDS)
def test_the_description_of_a_number_names_its_unit(kind: str) -> None:
    unnamed = [
        path
        for path, node in nodes(at(kind, "spec"), "spec")
        if node.get("type") in {"integer", "number"} and not UNITS.search(node["description"])
    ]
    assert unnamed == []


@pytest.mark.parametrize("kind", CRDS)
def test_the_schema_is_structural(kind: str) -> None:
    for path, node in nodes(schema(kind)):
        if node.get("x-kubernetes-int-or-string"):
            continue
        assert "type" in node, path
        unknown = {word for word in node if not word.startswith("x-kubernetes-")} - KEYWORDS
        assert not unknown, f"{path} has unknown keywords: {unknown}"
        assert not ("properties" in node and "additionalProperties" in node), path
        if node["type"] == "integer":
            assert node["format"] in INTEGER_FORMATS, path
        for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            assert node.get(exclusive) in {None, True}, path
            assert exclusive not in node or inclusive in node, path
        if node.get("x-kubernetes-list-type") == "map":
            assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"]), path


@pytest.mark.parametrize("kind", CRDS)
def test_every_kind_has_a_status_and_the_columns_that_kubectl_shows(kind: str) -> None:
    crd = CRDS[kind]["spec"]
    version = crd["versions"][0]
    assert crd["names"].get("categories") == (None if kind == "Tenant" else ["graft"])
    assert version["subresources"]["status"] == {}
    assert schema(kind)["required"] == ["spec"]
    columns = version["additionalPrinterColumns"]
    assert [columns[0]["name"], "Age" in {column["name"] for column in columns}] == ["Stage", True]
    for column in columns:
        path = re.sub(r"\[\?.*?\]", "", column["jsonPath"]).removeprefix(".")
        if not path.startswith("metadata"):
            node: dict[str, Any] = schema(kind)
            for name in path.split("."):
                node = (node.get("items") or node)["properties"][name]


def test_defaults_fill_in_missing_fields_at_every_depth() -> None:
    assert at("FineTuneJob", "spec.training")["default"] == {}
    assert at("FineTuneJob", "spec.training.lrSchedulerType")["default"] == "cosine"
    assert at("FineTuneJob", "spec.method.lora.rank")["default"] == 16
    assert at("AdapterDeployment", "spec.adapters")["default"] == []
    assert "default" not in at("FineTuneJob", "spec.resources"), "a missing field must differ from an empty one"


@pytest.mark.parametrize("kind", CRDS)
def test_a_status_has_no_defaults(kind: str) -> None:
    assert [path for path, node in nodes(at(kind, "status")) if "default" in node] == []


def test_an_exclusive_bound_has_the_form_of_openapi() -> None:
    split = at("FineTuneJob", "spec.dataset.evalSplit")
    assert (split["minimum"], split["exclusiveMinimum"], split["maximum"], split["exclusiveMaximum"]) == (
        0,
        True,
        1,
        True,
    )


def test_only_the_resolved_hyperparameters_are_free_form() -> None:
    free = [
        (kind, path)
        for kind in CRDS
        for path, node in nodes(schema(kind))
        if node.get("x-kubernetes-preserve-unknown-fields")
    ]
    assert free == [("FineTuneJob", ".status.resolved.training")]


def test_the_number_of_parameters_is_a_64_bit_integer() -> None:
    assert at("BaseModel", "spec.facts.parameters")["format"] == "int64"


def test_the_generator_refuses_a_union() -> None:
    with pytest.raises(ValueError, match="no unions"):
        crdgen.structural({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {}, defaults=True)


def test_the_reference_names_every_field_and_every_reason() -> None:
    text = crdgen.reference(REASONS)
    assert "| `spec.method.lora.rank` | integer, ≥ 1 and ≤ 512 | `16` |" in text
    assert "| `spec.training.learningRate` | number, > 0 and ≤ 1 |" in text
    for kind, conditions in REASONS.items():
        assert f"## {kind}" in text
        for reasons in conditions.values():
            for reason, meaning in reasons.items():
                assert f"| `{reason}` | {meaning} |" in text


def test_bars_in_table_cells_are_escaped() -> None:
    rows = [line for line in crdgen.reference(REASONS).splitlines() if line.startswith("| `")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {4, 5}
