"""What a command prints: text for people, or JSON and YAML for programs."""

import json
import re
from typing import Any, Literal

Output = Literal["text", "json", "yaml"]
OUTPUTS: tuple[Output, ...] = ("text", "json", "yaml")
# Tenants write what reports, data and messages of the cluster hold. Control characters could change what a terminal shows or
# does (CVE-2021-25743), and characters that turn the direction the order of a text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: str) -> str:
    """Return a text for a terminal: with \\u001b instead of the character that begins a command for the terminal."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show(value: Any, text: str, output: Output) -> None:
    """Print `value` in a form for programs, or `text`."""
    if output == "json":
        print(safe(json.dumps(value, indent=1, ensure_ascii=False)))
    elif output == "yaml":
        import yaml

        found = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        print(yaml.safe_dump(value, sort_keys=False) if UNSAFE.search(found) else found, end="")
    else:
        print(safe(text))
