"""Who is looked at when something else changes."""

from typing import Any

import pytest
from graft import handlers
from graft.reconcile.queue import Queue


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue that follows some Adapters and never looks at them."""

    class Followed(Queue):
        def keys(self, kind: str, namespace: str | None = None) -> list[tuple[str, str, str]]:
            names = ("support-1.0.0", "support-2.0.0", "sales-1.0.0", "support-desk-1.0.0", "both-1.0.0")
            return [("Adapter", "shop", name) for name in names if kind == "Adapter" and namespace == "shop"]

    found = Followed({})
    monkeypatch.setattr(handlers.operator, "queue", found)
    return found


def woken(spec: dict[str, Any], **status: Any) -> set[str]:
    name = f"{spec['adapter']}-{spec['version']}"
    body = {"metadata": {"name": name}, "spec": spec, "status": status}
    return {key[2] for key in handlers._referring("Adapter", "shop", {}, body)}


def test_a_composition_wakes_its_parents_which_may_have_to_be_restored(queue: Queue) -> None:
    parents = [{"adapter": "support@^1", "weight": 1}, {"adapter": "elsewhere@latest", "weight": 1}]
    spec = {"adapter": "both", "version": "1.0.0", "compose": {"parents": parents, "method": "cat"}}
    assert woken(spec) == {"support-1.0.0", "support-2.0.0"}
    ready = {"type": "Ready", "status": "True", "reason": "Verified"}
    assert woken(spec, conditions=[ready]) == set()
    assert woken({"adapter": "support", "version": "1.0.0", "artifact": {}}) == {"support-2.0.0", "support-desk-1.0.0"}
