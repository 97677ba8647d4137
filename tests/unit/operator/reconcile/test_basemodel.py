"""The revision of a hub's model is resolved once. What the hub does later is shown, and not followed."""

from __future__ import annotations

from typing import Any

import pytest
from graft.api import BaseModel
from graft.artifacts.sources import Description, SourceError, describe
from graft.reconcile.basemodel import observe, pinned
from worlds.hub import COMMIT, Hub, hub

__all__ = ["hub"]
NEW = "f" * 40


def model(wanted: str = "hf://org/model@main", **status: Any) -> BaseModel:
    return BaseModel.model_validate(
        {"metadata": {"name": "m", "generation": 2}, "spec": {"source": wanted}, "status": {"conditions": [], **status}}
    )


def looked_at(found: BaseModel, hub: Hub) -> BaseModel:
    """Return the BaseModel with the status that one reconcile writes."""
    described = describe(found.spec.source, None, hub.endpoint, None, pinned(found))
    status, conditions = observe(found, described)
    return found.model_copy(update={"status": status.model_copy(update={"conditions": conditions})})


def ready(found: BaseModel) -> tuple[str, str, str]:
    [condition] = found.status.conditions
    return condition.status, condition.reason, condition.message


def test_a_branch_that_moves_is_shown_and_not_followed(hub: Hub) -> None:
    found = looked_at(model(), hub)
    assert (found.status.revision, ready(found)[1]) == (COMMIT, "Resolved")
    for _ in range(2):
        hub.heads = {"main": NEW}
        found = looked_at(found, hub)
        assert found.status.revision == COMMIT
        assert ready(found) == (
            "True",
            "SourceChanged",
            f"main refers to {NEW} now. Jobs and deployments stay on {COMMIT}, to which it was first resolved. To change to "
            f"it, set spec.source: hf://org/model@{NEW}.",
        )
    hub.heads = {"main": ""}
    found = looked_at(found, hub)
    assert (found.status.revision, ready(found)[:2]) == (COMMIT, ("True", "SourceChanged"))
    assert ready(found)[2].startswith("main does not exist any more. Jobs and deployments stay on")
    hub.heads = {}
    assert ready(looked_at(found, hub))[1] == "Resolved"


def test_a_changed_source_is_resolved_again(hub: Hub) -> None:
    hub.heads = {"main": NEW}
    known: dict[str, Any] = {"revision": COMMIT, "source": "hf://org/model@main"}
    assert pinned(model(**known)) == COMMIT
    assert pinned(model(revision=COMMIT)) == COMMIT  # resolved by an earlier version of Graft
    for source in ("hf://org/model", "hf://org/model@v2", f"hf://org/model@{NEW}", "hf://org/other@main"):
        assert pinned(model(source, **known)) is None
    assert pinned(model(f"hf://org/model@{NEW}", revision=COMMIT)) is None
    found = looked_at(model("hf://org/model", **known), hub)
    assert (found.status.revision, found.status.source) == (NEW, "hf://org/model")


def test_nothing_of_an_earlier_source_stays_in_the_status() -> None:
    """Pods got the digest or the revision of the earlier source for the files in a claim, and refused them."""
    known: dict[str, Any] = {"revision": COMMIT, "source": "hf://org/model@main", "sizeBytes": 7, "digest": "sha256:a"}
    status, conditions = observe(model("pvc://models/tiny", **known), None)
    assert (status.stage, status.source) == ("Ready", "pvc://models/tiny")
    assert (status.revision, status.digest, status.size_bytes, status.facts) == (None, None, None, None)
    gone = observe(model("s3://graft/models/tiny", **known), SourceError("there is no config.json"))[0]
    assert (gone.stage, gone.revision, gone.digest) == ("Unavailable", None, None)
    found = Description("sha256:b", None, {"model_type": "llama"}, 8)
    _, [ready] = observe(model("s3://graft/models/tiny", source="s3://graft/models/old", digest="sha256:a"), found)
    assert ready.reason == "Resolved"
    assert conditions[0].reason == "NotInspected"


def test_a_model_whose_task_becomes_wrong_has_the_status_of_a_fresh_one() -> None:
    """A changed one kept source, digest and size, and a fresh one had none of them."""
    found = Description("sha256:a", None, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, 8)
    plain = model("s3://graft/models/tiny")
    wrong = plain.model_copy(update={"spec": plain.spec.model_copy(update={"task": "seq2seq"})})
    good, _ = observe(plain, found)
    fresh = observe(wrong, found)
    assert observe(wrong.model_copy(update={"status": good}), found) == fresh
    assert (fresh[0].stage, fresh[0].source, fresh[0].digest, fresh[0].size_bytes) == (
        "Unavailable",
        "s3://graft/models/tiny",
        "sha256:a",
        8,
    )
    assert [item.reason for item in fresh[1]] == ["SourceInvalid"]
    assert observe(plain.model_copy(update={"status": fresh[0]}), found)[0] == good


def test_a_commit_that_the_hub_has_deleted_is_named(hub: Hub) -> None:
    hub.heads = {COMMIT: ""}
    with pytest.raises(SourceError, match="does not exist"):
        describe("hf://org/model@main", None, hub.endpoint, None, COMMIT)
