"""What the status records about the use of a version, and which deletions also delete its files."""

from typing import Any

import pytest
from graft.api import Adapter, FineTuneJob
from graft.api.meta import Condition
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestFile, ManifestJob
from graft.manifests.adapter import adapter as build
from graft.reconcile.adapter.adapter import in_use
from graft.reconcile.adapter.lifecycle import archived_condition, removes_files, use
from worlds.versions import OLD, deployment


def with_condition(adapter: Adapter, *conditions: Condition) -> Adapter:
    kept = [*adapter.status.conditions, *conditions]
    return adapter.model_copy(update={"status": adapter.status.model_copy(update={"conditions": kept})})


def test_last_used_time_changes_only_when_a_use_begins_or_ends() -> None:
    before = OLD.status.last_used_time
    assert use(OLD, []) == {"used_by": [], "last_used_time": before}
    assert use(OLD, ["desk"])["last_used_time"] > (before or "")
    served = with_condition(OLD, in_use(["desk"]))
    assert use(served, ["desk", "other"]) == {"used_by": ["desk", "other"], "last_used_time": before}
    assert use(served, [])["last_used_time"] > (before or "")


def retained(reason: str) -> Condition:
    return Condition(type="Retained", status="False", reason=reason, message="m", last_transition_time="")


def policy(adapter: Adapter, deletion: str) -> Adapter:
    return adapter.model_copy(update={"spec": adapter.spec.model_copy(update={"deletion_policy": deletion})})


@pytest.mark.parametrize(
    ("adapter", "deployments", "expected"),
    [
        (OLD, [], False),
        (policy(OLD, "Delete"), [], True),
        (with_condition(OLD, retained("Expiring")), [], False),  # a user deleted it by hand and keeps the files
        (with_condition(OLD, retained("Pruned")), [], True),
        (with_condition(OLD, retained("Pruned")), [deployment("support@^1")], True),
        (with_condition(OLD, retained("Pruned")), [deployment("support@1.0.0")], False),
    ],
)
def test_which_deletions_also_delete_the_files(adapter: Adapter, deployments: list[Any], expected: bool) -> None:
    assert removes_files(adapter, deployments) is expected


def test_the_condition_of_an_archived_version_says_how_to_restore_it() -> None:
    told = archived_condition()
    assert (told.status, told.reason) == ("False", "Archived") and "AdapterDeployment" in told.message


@pytest.mark.parametrize("more", [{}, {"baseVersions": "^1", "retention": {"keep": 2, "unusedFor": "30d"}}])
def test_an_adapter_gets_the_retention_policy_of_its_job(more: dict[str, Any]) -> None:
    spec = {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "support"} | more,
    }  # fmt: skip
    job = FineTuneJob.model_validate({"metadata": {"name": "j", "namespace": "shop", "uid": "u"}, "spec": spec})
    files = [
        ManifestFile(name=name, size=1, sha256="0" * 64)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    manifest = Manifest(
        adapter="support", version="1.0.0", method="lora", base_model=ManifestBaseModel(name="tiny", uri="s3://b/m"),
        job=ManifestJob(name="j", namespace="shop", uid="u", attempt="a"), recipe="r", hyperparameters={}, files=files,
        created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    made = build(job, manifest, "sha256:" + "0" * 64, "graft")["spec"]
    assert {key: made[key] for key in ("baseVersions", "retention") if key in made} == more
    assert (
        Adapter.model_validate({"metadata": {"name": "support-1.0.0"}, "spec": made}).spec.deletion_policy == "Retain"
    )
