"""Valid and wrong values of a field, from its schema."""

import re
from typing import Any

from graft.api.patterns import QUANTITY

from worlds.fields.patterns import matching, missing, too_long
from worlds.fields.schema import KEY, Schema

INT32, INT64 = 2**31 - 1, 2**63 - 1
LARGE = 1e300
MATCHES = re.compile(r"self\.matches\(r'(.*)'\)")
MOST_ITEMS = 40  # a longer list is not made: only its bound is exceeded


def valid(schema: Schema) -> list[Any]:
    """Return different valid values: each of an enum, the smallest, the largest, the shortest, the longest."""
    if "enum" in schema:
        return list(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return [1, *matching(QUANTITY, schema.get("maxLength"))]
    kind = schema["type"]
    if kind == "boolean":
        return [True, False]
    if kind == "integer":
        return _integers(schema)
    if kind == "number":
        return _numbers(schema)
    if kind == "string":
        return _texts(schema)
    if kind == "array":
        return _lists(schema)
    return _objects(schema)


def minimal(schema: Schema) -> Any:
    """Return a small valid value."""
    if is_object(schema):
        return {name: minimal(schema["properties"][name]) for name in schema.get("required", [])}
    return valid(schema)[0]


def is_object(schema: Schema) -> bool:
    """Return whether a value has named fields, or is an object without any."""
    return schema.get("type") == "object" and "additionalProperties" not in schema


def _integers(schema: Schema) -> list[Any]:
    least = schema.get("minimum", -INT64 - 1 if schema["format"] == "int64" else -INT32 - 1)
    most = schema.get("maximum", INT64 if schema["format"] == "int64" else INT32)
    middle = min(most, max(least, 2))
    return list(dict.fromkeys([middle, least, min(least + 1, most), most]))


def _numbers(schema: Schema) -> list[Any]:
    least, most = schema.get("minimum", -LARGE), schema.get("maximum", LARGE)
    low = least + 1e-9 if schema.get("exclusiveMinimum") else least
    high = most - 1e-9 if schema.get("exclusiveMaximum") else most
    return list(dict.fromkeys([low + (min(high, 1.0) - low) / 2 if low > -LARGE else 0.5, low, high]))


def _texts(schema: Schema) -> list[Any]:
    most = schema.get("maxLength")
    if (pattern := pattern_of(schema)) is not None:
        least = schema.get("minLength", 0)
        return [text for text in matching(pattern, most) if len(text) >= least]
    short = "a" * max(1, schema.get("minLength", 0))
    return list(
        dict.fromkeys([short, "ä b", *(["a" * most] if most else []), *([""] if "minLength" not in schema else [])])
    )


def _lists(schema: Schema) -> list[Any]:
    least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
    different = distinct(schema, min(most, MOST_ITEMS))
    counts = {least, max(least, 1), min(max(least, 1) + 1, len(different)), len(different)}
    found = [different[:count] for count in sorted(counts) if count <= len(different)]
    return sorted(found, key=lambda value: not value)  # the empty one last


def distinct(schema: Schema, count: int) -> list[Any]:
    """Return up to `count` items of a list. They differ where the list is a set or a map."""
    items, keys = schema["items"], schema.get("x-kubernetes-list-map-keys", [])
    if items.get("type") == "object":
        first = minimal(items)
        # One key of several may be an enum. The others tell the items apart.
        schemas = {key: items["properties"][key] for key in keys}
        names = {
            key: found["enum"][:1] * count if "enum" in found else _names(found, count)
            for key, found in schemas.items()
        }
        return (
            [first | {key: texts[number] for key, texts in names.items()} for number in range(count)]
            if keys
            else [first] * count
        )
    found = valid(items) if "enum" in items else _names(items, count)
    return found[:count]


def _names(schema: Schema, count: int) -> list[Any]:
    """Return `count` different texts of a schema."""
    seed = next(text for text in valid(schema) if text)
    pattern = re.compile(pattern_of(schema) or "")
    for letters in ("ab", "AB"):
        for place in range(len(seed), -1, -1):
            found = [f"{seed[:place]}{letters[number % 2]}{number}{seed[place:]}" for number in range(count)]
            if all(pattern.search(text) for text in found):
                return found
    for place in range(len(seed)):
        found = [f"{seed[:place]}{number + 1}{seed[place + 1 :]}" for number in range(count)]
        if all(pattern.search(text) for text in found):
            return found
    raise ValueError(f"cannot make different texts for {pattern.pattern}")


def _objects(schema: Schema) -> list[Any]:
    if (entry := schema.get("additionalProperties")) is not None:
        first = valid(entry)[0]
        most = schema.get("maxProperties", 3)
        return [{KEY: first}, {f"{KEY}-{number}": first for number in range(most)}, {}]
    return [minimal(schema)]


def pattern_of(schema: Schema) -> str | None:
    """Return the regular expression of a text, from the CEL rule that stands for it."""
    for rule in schema.get("x-kubernetes-validations", []):
        if found := MATCHES.fullmatch(rule["rule"]):
            return found[1]
    return None


def wrong(schema: Schema) -> list[Any]:
    """Return values that the schema refuses: of another type, beyond each edge, outside of the enum."""
    if schema.get("x-kubernetes-int-or-string"):
        return [True, 1.5, {}, -1, "-1", *missing(QUANTITY), "1" * (schema["maxLength"] + 1)]
    kind = schema["type"]
    other = {
        "string": [7, True, ["a"], {}],
        "boolean": ["true", 1, {}],
        "array": ["a", {"a": "b"}],
        "object": ["a", ["a"]],
    }
    found: list[Any] = list(other.get(kind, ["1", True, [1], {}]))
    if kind == "integer":
        found.append(1.5)
    if "enum" in schema:
        first = schema["enum"][0]
        return [*found, *([first.upper() + "x", ""] if isinstance(first, str) else [first + 1, 0])]
    for low, exclusive, sign in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        if low in schema:
            found.append(schema[low] if schema.get(exclusive) else schema[low] + sign)
    if kind == "string":
        if (pattern := pattern_of(schema)) is not None:
            found += missing(pattern, schema.get("maxLength"))
            found += too_long(pattern, schema["maxLength"]) if "maxLength" in schema else []
        elif "maxLength" in schema:
            found.append("a" * (schema["maxLength"] + 1))
        if schema.get("minLength"):
            found.append("a" * (schema["minLength"] - 1))
    if kind == "array":
        found += _wrong_lists(schema)
    if "maxProperties" in schema:
        entry = valid(schema["additionalProperties"])[0]
        found.append({f"{KEY}-{number}": entry for number in range(schema["maxProperties"] + 1)})
    return found


def _wrong_lists(schema: Schema) -> list[Any]:
    found: list[Any] = []
    some = distinct(schema, 2)
    if "maxItems" in schema:
        most = schema["maxItems"]
        found.append(
            distinct(schema, most + 1)
            if schema["items"].get("type") == "object" or "enum" not in schema["items"]
            else some * most
        )
    if schema.get("minItems"):
        found.append(some[: schema["minItems"] - 1])
    if schema.get("x-kubernetes-list-type") in {"set", "map"}:
        found.append([some[0], some[0]])
    return found
