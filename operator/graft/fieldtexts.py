"""What a field's schema says about its type, default and limits, in words (PURE): for `kubectl explain` and docs/reference.md."""

import json
from typing import Any

JsonObject = dict[str, Any]

LIMITS = (
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " items"),
    ("minProperties", "maxProperties", " entries"),
)


def explained(schema: JsonObject) -> JsonObject:
    """Return a schema whose descriptions name defaults and limits, because `kubectl explain` does not show them."""
    out = dict(schema)
    if "description" in schema:
        out["description"] = " ".join([schema["description"], *_facts(schema)])
    if "properties" in schema:
        out["properties"] = {name: explained(child) for name, child in schema["properties"].items()}
    for word in ("items", "additionalProperties"):
        if word in schema:
            out[word] = explained(schema[word])
    return out


def _facts(schema: JsonObject) -> list[str]:
    """Return sentences about the default and the limits of a field, and about the limits of its items."""
    facts = []
    if (default := schema.get("default")) not in (None, {}, []):
        facts.append(f"Default: {default if isinstance(default, str) and default else json.dumps(default)}.")
    facts += [f"{text[0].upper()}{text[1:]}." for text in _limits_in_words(schema)]
    items = schema.get("items") or schema.get("additionalProperties") or {}
    if "description" not in items:
        facts += [f"Each: {text}." for text in _limits_in_words(items)]
    return facts


def _limits_in_words(schema: JsonObject) -> list[str]:
    texts = []
    for low, high, unit in LIMITS:
        least, most = schema.get(low), schema.get(high)
        parts = []
        if least is not None and most is not None and not {"exclusiveMinimum", "exclusiveMaximum"} & schema.keys():
            parts.append(f"from {least} to {most}")
        else:
            if least is not None:
                parts.append(f"{'above' if schema.get('exclusiveMinimum') else 'at least'} {least}")
            if most is not None:
                parts.append(f"{'below' if schema.get('exclusiveMaximum') else 'at most'} {most}")
        if parts:
            alone = parts == ["at least 1"]
            texts.append(" and ".join(parts) + (unit.removesuffix("s") if alone else unit))
    return texts


def type_text(schema: JsonObject) -> str:
    """Return the type and its limits, for the reference."""
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema["type"] == "array":
        return f"list of {type_text(schema['items'])}" + _limits(schema, "minItems", "maxItems", " items")
    if "additionalProperties" in schema:
        return f"map to {type_text(schema['additionalProperties'])}"
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
