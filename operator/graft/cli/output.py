"""What a command prints: text for people, or JSON and YAML for programs."""

import json
from typing import Any, Literal

Output = Literal["text", "json", "yaml"]
OUTPUTS: tuple[Output, ...] = ("text", "json", "yaml")


def show(value: Any, text: str, output: Output) -> None:
    """Print `value` in a form for programs, or `text`."""
    if output == "json":
        print(json.dumps(value, indent=1, ensure_ascii=False))
    elif output == "yaml":
        import yaml

        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")
    else:
        print(text)
