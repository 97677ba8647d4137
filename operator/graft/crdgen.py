"""Turns the API models into the CustomResourceDefinitions and docs/reference.md: `python -m graft.crdgen [--check]`.

The models are the only schema, so everything here is generated and committed; `--check` (CI, the unit tests) exits 1 with a
diff when a file on disk is not what the models say. Pydantic writes JSON Schema, the API server wants *structural* OpenAPI v3
(kubernetes.io/docs, "Extend the Kubernetes API", "Specifying a structural schema"); `structural` is the difference.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import yaml

from graft.api import GROUP, VERSION, Resource, adapter, adapterdeployment, basemodel, finetunejob
from graft.status import REASONS

ROOT = Path(__file__).resolve().parents[2]
CRD_DIRS = (Path("crds"), Path("charts/graft/files/crds"))
REFERENCE = Path("docs/reference.md")

# In the order in which a user meets them.
KINDS: tuple[ModuleType, ...] = (basemodel, finetunejob, adapter, adapterdeployment)

# What a structural schema and JSON Schema say alike.
SAME = ("type", "format", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")
INT32_MAX = 2**31 - 1

JsonObject = dict[str, Any]


def structural(node: JsonObject, definitions: JsonObject, *, defaults: bool) -> JsonObject:
    """The JSON Schema `node` as a structural schema: no $ref, no null, no title.

    With `defaults` the API server fills in what the user leaves out, so that `kubectl get` shows it and CEL rules may rely on
    it. Status models go without: their reader fills in, and the API server must not touch what the operator wrote.
    """
    node = _plain(node, definitions)
    out: JsonObject = {}
    if "description" in node:
        out["description"] = " ".join(node["description"].split())
    if node.get("x-kubernetes-int-or-string"):
        return out | {key: value for key, value in node.items() if key != "title" and value is not None}
    if "const" in node:
        node["enum"] = [node["const"]]
    out |= {key: node[key] for key in SAME if key in node}
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:
            out |= {inclusive: node[exclusive], exclusive: True}
    if out["type"] == "integer":
        out["format"] = "int32" if node.get("maximum", INT32_MAX + 1) <= INT32_MAX else "int64"
    if defaults and node.get("default") is not None:
        out["default"] = node["default"]
    out |= {key: value for key, value in node.items() if key.startswith("x-kubernetes-")}
    if "items" in node:
        out["items"] = structural(node["items"], definitions, defaults=defaults)
    if isinstance(
        node.get("additionalProperties"), dict
    ):  # false is what the API server does anyway, true is preserve-unknown
        out["additionalProperties"] = structural(node["additionalProperties"], definitions, defaults=defaults)
    if "properties" in node:
        required = node.get("required", [])
        out["properties"] = {
            name: structural(_with_factory(child, definitions, name in required), definitions, defaults=defaults)
            for name, child in node["properties"].items()
        }
        if required:
            out["required"] = list(required)
    return out


def _plain(node: JsonObject, definitions: JsonObject) -> JsonObject:
    """`node` with its reference followed and `X | None` reduced to X: absent is how Kubernetes says null."""
    node = dict(node)
    while "$ref" in node or ("anyOf" in node and not node.get("x-kubernetes-int-or-string")):
        if "$ref" in node:
            target = definitions[node.pop("$ref").removeprefix("#/$defs/")]
        else:
            choices = [choice for choice in node.pop("anyOf") if choice.get("type") != "null"]
            if len(choices) != 1:
                raise ValueError(f"a structural schema has no unions: {choices}")
            target = choices[0]
        node = target | node
    return node


def _with_factory(child: JsonObject, definitions: JsonObject, required: bool) -> JsonObject:
    """`child` with the default that pydantic's schema does not show: the empty object or list of a default_factory.

    The API server fills the empty object in turn from the defaults of its fields.
    """
    if required or "default" in child:
        return child
    return child | {"default": {} if _plain(child, definitions)["type"] == "object" else []}


def _model(module: ModuleType) -> type[Resource]:
    return cast(type[Resource], getattr(module, module.CRD["kind"]))


def _schema(module: ModuleType) -> JsonObject:
    """The openAPIV3Schema of a kind."""
    crd = module.CRD
    model = _model(module)
    json_schema = model.model_json_schema(by_alias=True)
    definitions = json_schema.get("$defs", {})
    spec, status = (
        structural(json_schema["properties"][part], definitions, defaults=part == "spec") for part in ("spec", "status")
    )
    spec_rules = spec.pop("x-kubernetes-validations", []) + crd.get("spec_rules", {}).get(
        "x-kubernetes-validations", []
    )
    if (mutable := crd.get("mutable")) is not None:
        spec_rules = spec_rules + fix(spec, mutable)
    if spec_rules:
        spec["x-kubernetes-validations"] = spec_rules
    return {
        "description": " ".join((model.__doc__ or "").split()),
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": f"{GROUP}/{VERSION}.", "type": "string"},
            "kind": {"description": f"{crd['kind']}.", "type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        **crd.get("rules", {}),
    }


def fix(spec: JsonObject, mutable: Sequence[str]) -> list[JsonObject]:
    """Make every field of a spec immutable but these: a rule on each field, and one on the spec against added or removed ones.

    One rule over all fields would do, but the API server's estimate of its cost exceeds the budget.
    """
    names = ", ".join(mutable)
    message = f"the spec is immutable but for {names}: delete the resource and create a new one"
    fixed = [name for name in spec["properties"] if name not in mutable]
    for name in fixed:
        schema = spec["properties"][name]
        own = schema.get("x-kubernetes-validations", [])
        schema["x-kubernetes-validations"] = [*own, {"rule": "self == oldSelf", "message": message}]
    optional = [name for name in fixed if name not in spec.get("required", [])]
    kept = " && ".join(f"has(self.{name}) == has(oldSelf.{name})" for name in optional)
    return [{"rule": kept, "message": message}] if optional else []


def custom_resource_definition(module: ModuleType) -> JsonObject:
    """The CustomResourceDefinition of the kind that `module` (one of KINDS) describes."""
    crd = module.CRD
    subresources: JsonObject = {"status": {}}
    if "scale" in crd:
        subresources["scale"] = crd["scale"]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{crd['plural']}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "graft", "app.kubernetes.io/component": "crds"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": crd["kind"],
                "listKind": crd["kind"] + "List",
                "plural": crd["plural"],
                "singular": crd["kind"].lower(),
                "shortNames": crd["shortNames"],
                "categories": ["graft"],
            },
            "scope": crd["scope"],
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in crd["columns"]
                    ],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": _schema(module)},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Repeats instead of using anchors, which the API server's strict decoding would take but readers would not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _type_text(schema: JsonObject) -> str:
    """The type with its limits, for the reference."""
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}" + _limits(schema, "minItems", "maxItems", " items")
    if "additionalProperties" in schema:
        return f"map to {_type_text(schema['additionalProperties'])}"
    if schema["type"] == "string":
        return str(schema.get("format", "string")) + _limits(schema, "minLength", "maxLength", " characters")
    return str(schema["type"]) + _limits(schema, "minimum", "maximum", "")


def _limits(schema: JsonObject, low: str, high: str, unit: str) -> str:
    parts = []
    if low in schema:
        parts.append((">" if schema.get("exclusiveMinimum") else "≥") + f" {schema[low]}")
    if high in schema:
        parts.append(("<" if schema.get("exclusiveMaximum") else "≤") + f" {schema[high]}")
    return f", {' and '.join(parts)}{unit}" if parts else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(schema: JsonObject, path: str) -> list[str]:
    """One table row per field below `schema`."""
    rows = []
    for name, child in schema.get("properties", {}).items():
        field = f"{path}.{name}"
        if name in schema.get("required", []):
            default = "required"
        elif child.get("default") not in (None, {}, []):
            default = f"`{json.dumps(child['default'])}`"
        else:
            default = ""
        rows.append(f"| `{field}` | {_type_text(child)} | {default} | {_cell(child['description'])} |")
        rows += _rows(child, field)
        rows += _rows(child.get("items", {}), field + "[]")
    return rows


def _all_rules(schema: JsonObject) -> list[str]:
    """The messages of the CEL rules of `schema` and below."""
    messages = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    for child in schema.get("properties", {}).values():
        messages += _all_rules(child)
    return messages


def reference(reasons: dict[str, dict[str, dict[str, str]]]) -> str:
    """docs/reference.md; `reasons` gives, per kind and condition type, what each reason means."""
    lines = [
        "# Reference",
        "",
        "<!-- Generated by `python -m graft.crdgen` from operator/graft/api and graft.status.REASONS. Do not edit. -->",
        "",
        f"The kinds of `{GROUP}/{VERSION}`. `kubectl explain finetunejob.spec.method` says the same in the cluster, and",
        "`kubectl get graft` lists the resources of all kinds.",
    ]
    for module in KINDS:
        crd = module.CRD
        schema = _schema(module)
        scope = "one per cluster" if crd["scope"] == "Cluster" else "in a namespace"
        lines += ["", f"## {crd['kind']}", "", schema["description"], ""]
        lines += [f"`kubectl get {crd['plural']}` (short: `{'`, `'.join(crd['shortNames'])}`), {scope}."]
        for part in ("spec", "status"):
            lines += [
                "",
                f"### {crd['kind']} {part}",
                "",
                "| field | type | default | description |",
                "|---|---|---|---|",
            ]
            lines += _rows(schema["properties"][part], part)
        if rules := _all_rules(schema):
            lines += ["", f"### {crd['kind']} rules", "", "The API server refuses what breaks one of these:", ""]
            lines += [f"- {message}" for message in rules]
        lines += ["", f"### {crd['kind']} conditions", "", "| condition | reason | what it means |", "|---|---|---|"]
        lines += [
            f"| `{condition}` | `{reason}` | {_cell(meaning)} |"
            for condition, meanings in reasons[crd["kind"]].items()
            for reason, meaning in meanings.items()
        ]
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every generated file: path below the repository's root -> text."""
    files = {}
    for module in KINDS:
        text = "# Generated by `python -m graft.crdgen` from operator/graft/api. Do not edit.\n" + yaml.dump(
            custom_resource_definition(module), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
        )
        for folder in CRD_DIRS:
            files[folder / f"{module.CRD['plural']}.{GROUP}.yaml"] = text
    files[REFERENCE] = reference(REASONS)
    return files


def differences(root: Path) -> str:
    """The diff from the files below `root` to what the models say; empty when there is none."""
    files = generated()
    diff: list[str] = []
    for path, text in files.items():
        there = (root / path).read_text() if (root / path).exists() else ""
        diff += difflib.unified_diff(there.splitlines(True), text.splitlines(True), str(path), f"{path} (generated)")
    for folder in CRD_DIRS:
        for stray in sorted((root / folder).glob("*.yaml")):
            if stray.relative_to(root) not in files:
                diff.append(f"{stray.relative_to(root)}: no kind makes this file\n")
    return "".join(diff)


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with --check only compare them."""
    parser = argparse.ArgumentParser(prog="python -m graft.crdgen", description="Generates CRDs and reference docs.")
    parser.add_argument("--check", action="store_true", help="exit 1 with a diff when a file on disk differs")
    if parser.parse_args(arguments).check:
        diff = differences(ROOT)
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, text in generated().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
