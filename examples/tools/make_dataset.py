"""Write data/train.jsonl and data/heldout.jsonl: orders of a shop are looked up and cancelled by calls of tools."""

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data"
ORDER = {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": ORDER}}
    for name, description in (("order_status", "Look up an order."), ("cancel_order", "Cancel an order."))
]
QUESTIONS = {
    "order_status": [
        "Where is order {}?",
        "Has my order {} been sent?",
        "What is the status of {}?",
        "Is {} on its way?",
    ],
    "cancel_order": [
        "Please cancel order {}.",
        "I no longer want order {}.",
        "Stop order {}, I bought it twice.",
        "Cancel {}!",
    ],
}
RESULTS = {"order_status": ("sent", "It has been sent."), "cancel_order": ("cancelled", "It is cancelled.")}


def conversation(draw: random.Random, *, whole: bool) -> dict[str, Any]:
    """Return one line: a question and its call. With `whole`, the tool's result and the answer follow."""
    name = draw.choice(list(QUESTIONS))
    order = draw.randrange(1000, 10_000)
    call = {"id": f"call{order:05}", "type": "function"}
    call["function"] = {"name": name, "arguments": json.dumps({"order": order})}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": draw.choice(QUESTIONS[name]).format(order)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    if whole:
        result, answer = RESULTS[name]
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"status": result})})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "tools": TOOLS}


def main() -> None:
    """Write both files. They are the same in every run."""
    draw = random.Random(7)  # noqa: S311 - a reproducible draw
    FOLDER.mkdir(exist_ok=True)
    for name, count, whole in (("train", 120, True), ("heldout", 24, False)):
        lines = [conversation(draw, whole=whole) for _ in range(count)]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
