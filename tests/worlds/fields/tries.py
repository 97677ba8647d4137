"""Try values of fields at the API server, by dry runs: which specs it accepts, and how it refuses the others."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from worlds.cluster.api import ALL_KINDS, Api, Object, Refused
from worlds.fields import hints
from worlds.fields.hints import NAMESPACE
from worlds.fields.schema import CLUSTER_WIDE, Field, Spec
from worlds.fields.values import wrong


@dataclass(frozen=True)
class Accepted:
    """A value that the API server accepts. `base`: the spec without it. `stored`: the object as it would be stored."""

    kind: str
    field: Field
    value: Any
    base: Spec
    stored: Object

    def __str__(self) -> str:
        return f"{self.kind} {self.field}={str(self.value)[:60]}"


@dataclass
class Tried:
    """What the API server said to all values of some fields."""

    accepted: list[Accepted] = field(default_factory=list)
    refused: list[tuple[str, Field, Any, str]] = field(default_factory=list)  # kind, field, value, message
    unexpected: list[str] = field(
        default_factory=list
    )  # refused although it is valid, or accepted although it is wrong


def manifest(kind: str, spec: Spec, name: str = "one", namespace: str = NAMESPACE) -> Object:
    """Return a resource. The name of an Adapter follows from its spec."""
    named = (
        f"{spec['adapter']}-{spec['version']}" if kind == "Adapter" and {"adapter", "version"} <= spec.keys() else name
    )
    place = {} if kind in CLUSTER_WIDE else {"namespace": namespace}
    return {"apiVersion": "graft.dev/v1alpha1", "kind": kind, "metadata": {"name": named} | place, "spec": spec}


def dry_run(api: Api, resource: Object) -> Object:
    """Ask the API server to create a resource without storing it, as strictly as kubectl does. Raises Refused."""
    path = ALL_KINDS[resource["kind"]].path(resource["metadata"].get("namespace"))
    return api.call("POST", f"{path}?dryRun=All&fieldValidation=Strict", resource)


def try_fields(api: Api, kind: str, chosen: list[Field]) -> Tried:
    """Try every valid and every wrong value of some fields of a kind."""
    tried = Tried()
    for item in chosen:
        home = None
        for value in hints.values(item):
            found = _first(api, kind, item, value, tried)
            if found is not None:
                tried.accepted.append(found)
                home = home or found.base
        if home is None:
            tried.unexpected.append(f"{kind} {item}: no value is accepted. Give it one in tests/worlds/fields/hints.py")
            continue
        for value in wrong(item.schema):
            try:
                dry_run(api, manifest(kind, hints.with_value(kind, home, item, value)))
            except Refused as error:
                tried.refused.append((kind, item, value, str(error)))
            else:
                tried.unexpected.append(f"{kind} {item}: {value!r:.80} is wrong, and is accepted")
    return tried


def _first(api: Api, kind: str, item: Field, value: Any, tried: Tried) -> Accepted | None:
    """Return the value in the first spec in which it is accepted."""
    messages = []
    for base in hints.SPECS[kind]:
        try:
            stored = dry_run(api, manifest(kind, hints.with_value(kind, base, item, value)))
        except Refused as error:
            messages.append(str(error))
            tried.refused.append((kind, item, value, str(error)))
            continue
        return Accepted(kind, item, value, base, stored)
    if value not in hints.hinted(item) and hints.hinted(item):
        return None
    tried.unexpected.append(f"{kind} {item}: {value!r:.80} is refused: {messages[0][:300]}")
    return None


def dropped(sent: Any, kept: Any, path: str = "spec") -> Iterator[str]:
    """Yield the paths of what was sent and is not stored with the same value."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        for key, value in sent.items():
            yield from dropped(value, kept.get(key), f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(kept, list) and len(sent) == len(kept):
        for number, (one, other) in enumerate(zip(sent, kept, strict=True)):
            yield from dropped(one, other, f"{path}[{number}]")
    elif sent != kept:
        yield path
