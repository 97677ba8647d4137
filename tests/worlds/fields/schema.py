"""The fields of a kind, from the schema of its CustomResourceDefinition, and specs with one field set or removed."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from graft import crdgen

Schema = dict[str, Any]
Spec = dict[str, Any]
ITEM, ENTRY = "[]", "{}"  # parts of a path: an item of a list, a value of a map
KINDS = {module.CRD["kind"]: module for module in crdgen.KINDS}
CLUSTER_WIDE = {kind for kind, module in KINDS.items() if module.CRD["scope"] == "Cluster"}
KEY = "example.com/key"  # of an entry of a map


@dataclass(frozen=True)
class Field:
    """A field below spec. `path` has the names of its parents and its own."""

    path: tuple[str, ...]
    schema: Schema
    required: bool = False

    def __str__(self) -> str:
        return ".".join(self.path).replace(".[]", "[]").replace(".{}", "{}")


@cache
def schema_of(kind: str) -> Schema:
    """Return the schema of the kind: that of the whole resource."""
    crd = crdgen.custom_resource_definition(KINDS[kind])
    return dict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


@cache
def spec_of(kind: str) -> Schema:
    """Return the schema of spec."""
    return dict(schema_of(kind)["properties"]["spec"])


def fields(schema: Schema, path: tuple[str, ...] = ()) -> Iterator[Field]:
    """Yield every field below a schema, parents first."""
    for name, child in schema.get("properties", {}).items():
        yield Field((*path, name), child, name in schema.get("required", []))
        yield from fields(child, (*path, name))
    for part, below in ((ITEM, schema.get("items")), (ENTRY, schema.get("additionalProperties"))):
        if below is not None:
            yield Field((*path, part), below)
            yield from fields(below, (*path, part))


def rules(schema: Schema) -> list[str]:
    """Return the messages of all CEL rules of a schema and of those below it."""
    found = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return found + [message for child in below if isinstance(child, dict) for message in rules(child)]


def put(schema: Schema, spec: Spec, path: tuple[str, ...], value: Any, make: Callable[[Field], Any]) -> Spec:
    """Return the spec with a value at the path. Absent parents are made by `make`."""
    spec, value = copy.deepcopy(spec), copy.deepcopy(value)
    here: Any = spec
    for number, part in enumerate(path):
        below = _below(schema, part)
        last = number == len(path) - 1
        if part == ITEM:
            here[:1] = [value if last else here[0] if here else make(Field(path[: number + 1], below))]
            here, schema = here[0], below
            continue
        key = next(iter(here), KEY) if part == ENTRY else part
        if last:
            here[key] = value
        elif key not in here:
            here[key] = copy.deepcopy(make(Field(path[: number + 1], below)))
        here, schema = here[key], below
    return spec


def _below(schema: Schema, part: str) -> Schema:
    if part in (ITEM, ENTRY):
        return dict(schema["items"] if part == ITEM else schema["additionalProperties"])
    return dict(schema["properties"][part])


def has(spec: Any, path: tuple[str, ...]) -> bool:
    """Return whether the spec has a value at the path."""
    for part in path:
        if part == ITEM:
            if not spec:
                return False
            spec = spec[0]
        elif part == ENTRY:
            if not spec:
                return False
            spec = next(iter(spec.values()))
        elif part not in spec:
            return False
        else:
            spec = spec[part]
    return True


def without(spec: Spec, path: tuple[str, ...]) -> Spec:
    """Return the spec without the field at the path."""
    spec = copy.deepcopy(spec)
    here: Any = spec
    for part in path[:-1]:
        here = here[0] if part == ITEM else next(iter(here.values())) if part == ENTRY else here[part]
    if path[-1] == ITEM:
        del here[0]
    else:
        del here[next(iter(here)) if path[-1] == ENTRY else path[-1]]
    return spec
