"""Which adapters fit which files of a base model, and when the pods change to new files."""

from dataclasses import replace
from typing import Any

import pytest
from graft.api import Adapter, BaseModel
from graft.contracts.message import BaseModelRef
from graft.reconcile.adapter.compatibility import compatible_bases, fits
from graft.reconcile.adapterdeployment.basechange import base_of, in_force, unfit
from graft.reconcile.adapterdeployment.serving import Resolution, plan_routes, resolve, wanted_adapter
from worlds.deployments import adapter as plain
from worlds.deployments import deployment, replica, target

OLD = BaseModelRef(name="tiny", uri="s3://graft/models/tiny", digest="sha256:old", version="1.0.0")
NEW = BaseModelRef(name="tiny", uri="s3://graft/models/tiny", digest="sha256:new", version="1.1.0")


def adapter(
    version: str, tuned_on: str | None = "sha256:old", fits: str | None = None, reason: str = "", **more: Any
) -> Adapter:
    made = plain(version, **more)
    conditions = (
        [made.status.conditions[0].model_copy(update={"reason": reason, "status": "False"})] if reason else None
    )
    status = {"base_model_digest": tuned_on} | ({"conditions": conditions} if conditions else {})
    return made.model_copy(
        update={
            "status": made.status.model_copy(update=status),
            "spec": made.spec.model_copy(update={"base_versions": fits}),
        }
    )


def picked(found: list[Resolution]) -> list[str | None]:
    return [item.adapter.metadata.name if item.adapter else None for item in found]


@pytest.mark.parametrize(
    ("item", "base", "expected"),
    [
        (adapter("1.0.0"), OLD, True),
        (adapter("1.0.0"), NEW, False),
        (adapter("1.0.0", fits="^1"), NEW, True),
        (adapter("1.0.0", fits="1.0"), NEW, False),
        (adapter("1.0.0", fits="1.1.0"), NEW, True),
        (adapter("1.0.0", fits="^1"), NEW.model_copy(update={"version": None}), False),
        (adapter("1.0.0", fits="^1"), NEW.model_copy(update={"name": "other"}), False),
        (adapter("1.0.0"), OLD.model_copy(update={"name": "copy", "version": "9.0.0"}), True),
        (adapter("1.0.0", "hf://a/b@c0ffee"), BaseModelRef(name="tiny", uri="hf://a/b@c0ffee"), True),
        (adapter("1.0.0", "hf://a/b@c0ffee"), BaseModelRef(name="tiny", uri="hf://a/b@decade"), False),
        (adapter("1.0.0", "pvc://claim/m"), BaseModelRef(name="tiny", uri="pvc://claim/m"), True),
        (adapter("1.0.0", None), NEW, True),
    ],
)
def test_which_adapters_fit_which_base_model(item: Adapter, base: BaseModelRef, expected: bool) -> None:
    assert fits(item, base) is expected


def test_the_newest_version_that_fits_is_served() -> None:
    versions = [adapter("1.0.0"), adapter("1.2.0", "sha256:new"), adapter("1.1.0", fits="^1")]
    assert picked(resolve(deployment(), versions, OLD)) == ["support-1.1.0"]
    assert picked(resolve(deployment(), versions, NEW)) == ["support-1.2.0"]


def test_an_incompatible_adapter_is_reported_with_a_remedy() -> None:
    (found,) = resolve(deployment(), [adapter("1.0.0")], NEW)
    assert found.reason == "AdapterIncompatible"
    for words in ("support-1.0.0", "sha256:old", "sha256:new", "1.1.0", "tune a version", "spec.baseVersions"):
        assert words in found.message


def test_an_archived_version_is_restored_while_an_older_one_answers() -> None:
    old, away = adapter("1.0.0"), adapter("1.1.0", reason="Archived")
    (found,) = resolve(deployment(), [old, away], OLD)
    assert (found.adapter, found.restoring) == (old, away)
    (found,) = resolve(deployment(adapters=["support@1.1.0"]), [old, away], OLD)
    assert (found.adapter, found.restoring, found.reason) == (None, away, "AdapterMissing")
    assert "restored" in found.message


def model(name: str, digest: str, **spec: Any) -> BaseModel:
    ready = {"type": "Ready", "status": "True", "reason": "Resolved", "message": "m", "observedGeneration": 1}
    return BaseModel.model_validate(
        {
            "metadata": {"name": name, "generation": 1},
            "spec": {"source": f"s3://graft/models/{name}"} | spec,
            "status": {"digest": digest, "conditions": [ready | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]},
        }
    )


def test_the_status_lists_the_compatible_base_models() -> None:
    models = [
        model("tiny", "sha256:new", version="1.1.0"), model("copy", "sha256:old"), model("other", "sha256:other"),
        model("secret", "sha256:old", allowedNamespaces=["elsewhere"]),
    ]  # fmt: skip
    found = compatible_bases(adapter("1.0.0", fits="^1"), models, None)
    assert [(item.name, item.version, item.digest) for item in found] == [
        ("copy", None, "sha256:old"), ("tiny", "1.1.0", "sha256:new"),
    ]  # fmt: skip


def test_pods_change_only_when_every_served_adapter_fits_the_new_files() -> None:
    spec = deployment(adapters=["support@latest", "sales@latest", "missing@1"])
    support, sales = adapter("1.0.0"), adapter("1.0.0", name="sales")
    held = in_force(spec, [support, sales], NEW, OLD)
    assert (held.base, picked(held.resolutions)) == (OLD, ["support-1.0.0", "sales-1.0.0", None])
    assert held.held and "support-1.0.0" in held.held and "sales-1.0.0" in held.held and "missing" not in held.held
    half = in_force(spec, [support, sales, adapter("1.0.1", "sha256:new")], NEW, OLD)
    assert half.base == OLD and half.held and "support" not in half.held
    both = [support, adapter("1.0.1", "sha256:new"), adapter("1.0.0", fits="^1", name="sales")]
    rolled = in_force(spec, both, NEW, OLD)
    assert (rolled.base, rolled.held, picked(rolled.resolutions)) == (NEW, None, ["support-1.0.1", "sales-1.0.0", None])


def test_a_new_deployment_uses_the_present_base_model() -> None:
    found = in_force(deployment(), [adapter("1.0.0")], NEW, None)
    assert (found.base, found.held, picked(found.resolutions)) == (NEW, None, [None])


def test_a_new_version_number_for_the_same_files_does_not_change_the_pods() -> None:
    renamed = OLD.model_copy(update={"version": "1.4.0"})
    found = in_force(deployment(), [adapter("1.0.0", "sha256:before", fits="1.4")], renamed, OLD)
    assert (found.base, picked(found.resolutions)) == (OLD, ["support-1.0.0"])
    moved = in_force(deployment(), [], OLD.model_copy(update={"uri": "s3://graft/models/moved"}), OLD).base
    assert moved is not None and moved.uri == "s3://graft/models/moved", "the old location may not exist any more"


def test_without_its_base_model_a_deployment_serves_the_adapters_that_fit_its_pods() -> None:
    found = in_force(deployment(), [adapter("1.0.0"), adapter("1.0.1", "sha256:new")], None, OLD)
    assert (found.base, picked(found.resolutions)) == (None, ["support-1.0.0"])


def pod(base: BaseModelRef | None) -> dict[str, Any]:
    return {"metadata": {"annotations": {"graft.dev/base-model": base.json_text()} if base else {}}}


def test_a_pod_serves_only_adapters_that_fit_its_own_files() -> None:
    one, two = adapter("1.0.0"), adapter("1.1.0", "sha256:new")
    names = {item.metadata.name: wanted_adapter("shop", item).engine_name for item in (one, two)}
    assert unfit("shop", [one, two], pod(OLD), NEW) == {names["support-1.1.0"]}
    assert unfit("shop", [one, two], pod(NEW), NEW) == {names["support-1.0.0"]}
    assert unfit("shop", [one, two], pod(None), NEW) == frozenset(), (
        "the files of this pod are unknown, so it may serve every adapter"
    )
    assert base_of({"metadata": {"annotations": {"graft.dev/base-model": "nonsense"}}}) is None
    later = adapter("1.2.0", "sha256:before", fits="1.4")
    assert unfit("shop", [later], pod(OLD), OLD.model_copy(update={"version": "1.4.0"})) == frozenset()


def test_during_a_rollout_the_route_moves_when_half_of_the_pods_fit_the_new_version() -> None:
    one, two = adapter("1.0.0"), adapter("1.1.0", "sha256:new")
    spec, adapters = deployment(), [one, two]

    def views(old: int, new: int) -> list[Any]:
        """Return replicas that have loaded both adapters. The files of each pod fit only one of them."""
        made = [(f"pod-{number}", pod(OLD if number <= old else NEW)) for number in range(1, old + new + 1)]
        return [replace(replica(name, one, two), unfit=unfit("shop", adapters, raw, NEW)) for name, raw in made]

    table = plan_routes(spec, resolve(spec, adapters, OLD), "shop", views(4, 0), None, None)
    assert target(table) == "support-1.0.0"
    after = resolve(spec, adapters, NEW)
    for old, new, expected in ((4, 1, "1.0.0"), (3, 2, "1.0.0"), (2, 2, "1.1.0"), (1, 4, "1.1.0"), (0, 4, "1.1.0")):
        rolled = plan_routes(spec, after, "shop", views(old, new), table, None)
        assert target(rolled) == f"support-{expected}"
        able = [item for item in rolled.backends if any(expected in name for name in item.loaded)]
        assert len(able) == (old if expected == "1.0.0" else new)
