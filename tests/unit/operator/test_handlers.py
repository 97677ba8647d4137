"""Which resources are reconciled when another resource changes."""

from typing import Any

import pytest
from graft import handlers
from graft.reconcile.shared.queue import Queue


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Return a queue that knows some resources and never reconciles them."""

    class Followed(Queue):
        def keys(self, kind: str, namespace: str | None = None) -> list[tuple[str, str, str]]:
            names = {
                "Adapter": ("support-1.0.0", "support-2.0.0", "sales-1.0.0", "support-desk-1.0.0", "both-1.0.0"),
                "AdapterDeployment": ("chat", "counter"),
            }
            return [(kind, "shop", name) for name in names.get(kind, ()) if namespace == "shop"]

    found = Followed({})
    monkeypatch.setattr(handlers.operator, "queue", found)
    monkeypatch.setattr(handlers.operator, "said", {})
    return found


def woken(spec: dict[str, Any], **status: Any) -> set[str]:
    """Return the names of the resources that a change of an Adapter wakes."""
    metadata = {"name": f"{spec['adapter']}-{spec['version']}", "namespace": "shop"}
    body = {"metadata": metadata, "spec": spec, "status": status}
    return {key[2] for key in handlers._referring("Adapter", body, "MODIFIED")}


def woken_by(name: str, *adapters: str, change: str | None = "MODIFIED", **status: Any) -> set[str]:
    """Return the names of the resources that a change of an AdapterDeployment wakes."""
    spec = {"baseModel": "tiny", "adapters": list(adapters)}
    body = {"metadata": {"name": name, "namespace": "shop"}, "spec": spec, "status": status}
    return {key[2] for key in handlers._referring("AdapterDeployment", body, change)}


def test_a_composition_wakes_its_parents_because_they_may_need_a_restore(queue: Queue) -> None:
    parents = [{"adapter": "support@^1", "weight": 1}, {"adapter": "elsewhere@latest", "weight": 1}]
    spec = {"adapter": "both", "version": "1.0.0", "compose": {"parents": parents, "method": "cat"}}
    assert woken(spec) == {"support-1.0.0", "support-2.0.0"}
    ready = {"type": "Ready", "status": "True", "reason": "Verified"}
    assert woken(spec, conditions=[ready]) == set()
    assert woken({"adapter": "support", "version": "1.0.0", "artifact": {}}) == {"support-2.0.0"}


def test_a_deployment_wakes_the_adapters_that_it_starts_or_stops_naming(queue: Queue) -> None:
    assert woken_by("chat", "support@^1") == {"support-1.0.0", "support-2.0.0"}
    assert woken_by("chat", "support@^1") == set()  # no reference has changed
    # The target of a rollback depends on the version in use.
    used = {"adapters": [{"name": "support", "resolved": "support-1.0.0"}]}
    assert woken_by("chat", "support@^1", **used) == {"support-1.0.0", "support-2.0.0"}
    assert woken_by("chat", "support@^1", observedGeneration=3, message="3 of 4 replicas", **used) == set()
    assert woken_by("chat", "sales@latest", **used) == {"support-1.0.0", "support-2.0.0", "sales-1.0.0"}
    assert woken_by("chat", "sales@latest", change="DELETED", **used) == {
        "support-1.0.0",
        "support-2.0.0",
        "sales-1.0.0",
    }
    assert woken_by("chat", "support-desk@1.0.0") == {"support-desk-1.0.0"}


def test_a_restored_version_is_woken_again_when_it_is_resolved(queue: Queue) -> None:
    woken_by("chat", "support@^1", adapters=[{"ref": "support@^1", "restoring": "support-1.0.0"}])
    assert woken_by("chat", "support@^1", adapters=[{"ref": "support@^1", "name": "support-1.0.0"}]) == {
        "support-1.0.0",
        "support-2.0.0",
    }


def test_after_a_new_listing_every_adapter_of_the_namespace_is_woken(queue: Queue) -> None:
    """No event reports a resource that was deleted while the watch was interrupted."""
    woken_by("chat", "support@^1")
    assert woken_by("chat", "support@^1", change=None) == {key[2] for key in queue.keys("Adapter", "shop")}


@pytest.mark.parametrize("text", ["a-1.2.²", "a-1.2." + "9" * 5000, "-", "@", ""])
def test_an_invalid_reference_does_not_keep_other_resources_from_being_woken(queue: Queue, text: str) -> None:
    woken_by("chat", "support@^1", text)
    assert woken({"adapter": "support", "version": "1.0.0"}) == {"support-2.0.0", "chat"}


def test_an_adapter_wakes_the_deployments_that_refer_to_it(queue: Queue) -> None:
    woken_by("chat", "support@^1")
    woken_by("counter", "sales@latest", adapters=[{"resolved": "both-1.0.0"}])
    assert woken({"adapter": "sales", "version": "1.0.0"}) == {"counter"}
    assert woken({"adapter": "both", "version": "1.0.0"}) == {"counter"}
    assert woken({"adapter": "support", "version": "1.0.0"}) == {"support-2.0.0", "chat"}
    woken_by("chat", change="DELETED")
    assert woken({"adapter": "support", "version": "1.0.0"}) == {"support-2.0.0"}


def test_work_that_ends_after_a_deletion_starts_no_reconcile(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    woken_keys: list[tuple[str, str, str]] = []
    monkeypatch.setattr(queue, "wake", lambda *key: woken_keys.append(key))
    monkeypatch.setattr(handlers.operator, "uids", {("Adapter", "shop", "support-1.0.0"): "uid"})
    handlers._wake_known("Adapter", "shop", "support-1.0.0")
    handlers._wake_known("Adapter", "shop", "deleted-1.0.0")
    assert woken_keys == [("Adapter", "shop", "support-1.0.0")]
