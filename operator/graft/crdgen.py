"""Generate the CustomResourceDefinitions, docs/reference.md, docs/troubleshooting.md and the chart's list of addresses:
`python -m graft.crdgen [--check]`.

The models are the only schema, so the generated files are committed. With `--check` (CI, the unit tests), the command
exits with 1 and prints a diff if a file on disk differs from the models. Pydantic writes JSON Schema, but the API
server needs *structural* OpenAPI v3 (kubernetes.io/docs, "Extend the Kubernetes API", "Specifying a structural
schema"). `structural` converts one into the other.
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

from graft import chartvalues, remedies
from graft.api import (
    GROUP,
    VERSION,
    Resource,
    adapter,
    adapterdeployment,
    apikey,
    basemodel,
    engineargs,
    finetunejob,
    tenant,
)
from graft.api.patterns import SENTENCES
from graft.fieldtexts import explained, type_text
from graft.manifests import network
from graft.status import REASONS

ROOT = Path(__file__).resolve().parents[2]
CRD_DIRS = (Path("crds"), Path("charts/graft/files/crds"))
REFERENCE = Path("docs/reference.md")
TROUBLESHOOTING = Path("docs/troubleshooting.md")
CHART_VALUES, VALUES = Path("charts/graft/values.yaml"), Path("docs/values.md")
ADDRESSES = Path("charts/graft/files/addresses.yaml")

# In the order in which a user meets them.
KINDS: tuple[ModuleType, ...] = (basemodel, finetunejob, adapter, adapterdeployment, apikey, tenant)

# Keywords that mean the same in a structural schema and in JSON Schema.
SAME = (
    "type", "format", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "minimum",
    "maximum",
)  # fmt: skip
INT32_MAX = 2**31 - 1
IS_AMOUNT = "type(self) == int ? self >= 0 : isQuantity(self) && !self.startsWith('-')"

JsonObject = dict[str, Any]


def structural(node: JsonObject, definitions: JsonObject, *, defaults: bool) -> JsonObject:
    """Return the JSON Schema `node` as a structural schema, without $ref, null and title.

    With `defaults`, the API server fills in absent fields. `kubectl get` then shows them, and CEL rules can rely on
    them. Status models have no defaults: their reader fills them in, and the API server must not change what the
    operator wrote.
    """
    node = _plain(node, definitions)
    out: JsonObject = {}
    if "description" in node:
        out["description"] = " ".join(node["description"].split())
    if node.get("x-kubernetes-int-or-string"):
        out |= {key: value for key, value in node.items() if key != "title" and value is not None}
        return _with_sentence(out) if defaults else out
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
    if defaults:
        out = _with_sentence(out)
    if "items" in node:
        out["items"] = structural(node["items"], definitions, defaults=defaults)
    if isinstance(
        node.get("additionalProperties"), dict
    ):  # false is the API server's default, true is preserve-unknown
        out["additionalProperties"] = structural(node["additionalProperties"], definitions, defaults=defaults)
    if node.get("properties"):  # the API server does not store an empty map
        required = node.get("required", [])
        out["properties"] = {
            name: structural(_with_factory(child, definitions, name in required), definitions, defaults=defaults)
            for name, child in node["properties"].items()
        }
        if required:
            out["required"] = list(required)
    return out


def _with_sentence(schema: JsonObject) -> JsonObject:
    """Return a schema with a CEL rule instead of its pattern. The API server would answer with the pattern, of which a URI's
    has 200 characters. Raises KeyError for a pattern without a sentence."""
    if "pattern" not in schema:
        return schema
    pattern = schema["pattern"]
    # Kubernetes before 1.34 estimates an amount with 3 MB. A regular expression over it would cost too much.
    matches = IS_AMOUNT if schema.get("x-kubernetes-int-or-string") else f"self.matches(r'{pattern}')"
    rules = [{"rule": matches, "message": SENTENCES[pattern]}, *schema.get("x-kubernetes-validations", [])]
    return {key: value for key, value in schema.items() if key != "pattern"} | {"x-kubernetes-validations": rules}


def _plain(node: JsonObject, definitions: JsonObject) -> JsonObject:
    """Return `node` with its references resolved and `X | None` reduced to X, because Kubernetes expresses null by
    absence."""
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
    """Return `child` with the default of its default_factory, which pydantic's schema does not show: an empty object or
    list.

    The API server then fills the empty object from the defaults of its fields.
    """
    if required or "default" in child:
        return child
    return child | {"default": {} if _plain(child, definitions)["type"] == "object" else []}


def _model(module: ModuleType) -> type[Resource]:
    return cast(type[Resource], getattr(module, module.CRD["kind"]))


def _schema(module: ModuleType) -> JsonObject:
    """Return the openAPIV3Schema of a kind."""
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
    """Make every field of a spec immutable except those in `mutable`. Return the rules for the spec itself.

    Each immutable field gets a rule of its own. A rule on the spec refuses added and removed fields. A single rule over
    all fields would be enough, but the API server's estimate of its cost exceeds the budget.
    """
    names = ", ".join(mutable)
    message = f"the spec is immutable, except for {names}: delete the resource and create a new one"
    fixed = [name for name in spec["properties"] if name not in mutable]
    for name in fixed:
        schema = spec["properties"][name]
        own = schema.get("x-kubernetes-validations", [])
        schema["x-kubernetes-validations"] = [*own, {"rule": "self == oldSelf", "message": message}]
    optional = [name for name in fixed if name not in spec.get("required", [])]
    kept = " && ".join(f"has(self.{name}) == has(oldSelf.{name})" for name in optional)
    return [{"rule": kept, "message": message}] if optional else []


def custom_resource_definition(module: ModuleType) -> JsonObject:
    """Return the CustomResourceDefinition of the kind that `module` (one of KINDS) describes."""
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
                **({"categories": found} if (found := crd.get("categories", ["graft"])) else {}),
            },
            "scope": crd["scope"],
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [
                        # The API server does not store a priority of 0, so GitOps tools would always see a difference.
                        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
                        for name, kind, path, priority in crd["columns"]
                    ],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": _with_facts(_schema(module))},
                }
            ],
        },
    }


def _with_facts(schema: JsonObject) -> JsonObject:
    """Return the schema of a kind whose spec names defaults and limits in its descriptions. Nobody writes a status by hand."""
    properties = schema["properties"]
    return schema | {"properties": properties | {"spec": explained(properties["spec"])}}


class _Dumper(yaml.SafeDumper):
    """A dumper that repeats values instead of using YAML anchors. The API server accepts anchors, but they are hard to
    read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


def _prose(text: str) -> str:
    """Return plain text as Markdown. Browsers and GitHub drop <name> as an unknown HTML tag unless it is escaped."""
    return text.replace("<", "&lt;")


def _rows(schema: JsonObject, path: str) -> list[str]:
    """Return one table row per field below `schema`."""
    rows = []
    for name, child in schema.get("properties", {}).items():
        field = f"{path}.{name}"
        if name in schema.get("required", []):
            default = "required"
        elif child.get("default") not in (None, {}, []):
            default = f"`{json.dumps(child['default'])}`"
        else:
            default = ""
        rows.append(f"| `{field}` | {type_text(child)} | {default} | {_cell(child['description'])} |")
        rows += _rows(child, field)
        rows += _rows(child.get("items", {}), field + "[]")
    return rows


def _all_rules(schema: JsonObject) -> list[str]:
    """Return the messages of the CEL rules of `schema` and of all schemas below it."""
    messages = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    for child in schema.get("properties", {}).values():
        messages += _all_rules(child)
    return messages


def reference(reasons: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return docs/reference.md. `reasons` gives the meaning of each reason, per kind and condition type."""
    lines = [
        "# Reference",
        "",
        "<!-- Generated by `python -m graft.crdgen` from operator/graft/api and graft.status.REASONS. Do not edit. -->",
        "",
        f"The kinds of `{GROUP}/{VERSION}`. `kubectl explain finetunejob.spec.method` shows the same texts in the cluster.",
        "`kubectl get graft` lists the resources of all kinds except Tenants.",
    ]
    for module in KINDS:
        crd = module.CRD
        schema = _schema(module)
        scope = "cluster-wide" if crd["scope"] == "Cluster" else "namespaced"
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
            lines += [
                "",
                f"### {crd['kind']} rules",
                "",
                "The API server refuses a resource that breaks one of these rules:",
                "",
            ]
            lines += [f"- {_prose(message)}" for message in dict.fromkeys(rules)]
        lines += ["", f"### {crd['kind']} conditions", "", "| condition | reason | what it means |", "|---|---|---|"]
        lines += [
            f"| `{condition}` | `{reason}` | {_cell(meaning)} |"
            for condition, meanings in reasons[crd["kind"]].items()
            for reason, meaning in meanings.items()
        ]
    lines += engineargs.reference()
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Return every generated file as path below the repository's root -> text."""
    files = {}
    for module in KINDS:
        text = "# Generated by `python -m graft.crdgen` from operator/graft/api. Do not edit.\n" + yaml.dump(
            custom_resource_definition(module), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
        )
        for folder in CRD_DIRS:
            files[folder / f"{module.CRD['plural']}.{GROUP}.yaml"] = text
    files[REFERENCE] = reference(REASONS)
    files[TROUBLESHOOTING] = remedies.page()
    files[VALUES] = chartvalues.document((Path(__file__).resolve().parents[2] / CHART_VALUES).read_text())
    files[ADDRESSES] = (
        "# Generated by `python -m graft.crdgen` from operator/graft/manifests/network.py. Do not edit.\n"
        "# NetworkPolicyPeers: all addresses except clouds' metadata and link-local addresses.\n"
        + yaml.dump(network.WORLD, Dumper=_Dumper, sort_keys=False)
    )
    return files


def differences(root: Path) -> str:
    """Return the diff from the files below `root` to the generated ones; empty if there is no difference."""
    files = generated()
    diff: list[str] = []
    for path, text in files.items():
        there = (root / path).read_text() if (root / path).exists() else ""
        diff += difflib.unified_diff(there.splitlines(True), text.splitlines(True), str(path), f"{path} (generated)")
    for folder in CRD_DIRS:
        for stray in sorted((root / folder).glob("*.yaml")):
            if stray.relative_to(root) not in files:
                diff.append(f"{stray.relative_to(root)}: no kind generates this file\n")
    return "".join(diff)


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or only compare them with --check."""
    parser = argparse.ArgumentParser(
        prog="python -m graft.crdgen",
        description="Generate the CRDs, the generated pages of docs/ and the chart's addresses.",
    )
    parser.add_argument(
        "--check", action="store_true", help="only compare: exit with 1 and print a diff if a file on disk differs"
    )
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
