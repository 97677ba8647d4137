"""Retention: which versions the policy archives or deletes. A version that is still needed is always kept."""

import itertools
import random
from typing import Any

import pytest
from graft.api import Adapter, AdapterDeployment
from graft.api.meta import Condition
from graft.contracts.message import BaseModelRef
from graft.reconcile.adapter import retention
from graft.reconcile.adapter.retention import Plan, decide, needs, number, state
from graft.reconcile.adapterdeployment.serving import resolve
from worlds.versions import DAY, NEW, NOW, OLD, POLICY, adapter, deployment, text


def announced(item: Adapter, at: float) -> Adapter:
    """Return the version after the operator has announced its deletion for the time `at`."""
    told = Condition(type="Retained", status="False", reason="Expiring", message="m", last_transition_time=text(0))
    status = item.status.model_copy(update={"pruned_after": text(at), "conditions": [*item.status.conditions, told]})
    return item.model_copy(update={"status": status})


def plan(item: Adapter, versions: list[Adapter], *deployments: dict[str, Any], now: float = NOW, **more: Any) -> Plan:
    return decide(item, versions, needs(versions, list(deployments), **more), now)


def test_without_a_policy_a_version_is_kept_without_a_message() -> None:
    old, new = adapter("1.0.0", 900), adapter("2.0.0", policy=None)
    assert plan(old, [old, new]) == Plan("keep")


def test_the_policy_of_the_newest_ready_version_applies() -> None:
    old = adapter("1.0.0", 100, policy=None)
    assert plan(old, [old, NEW]).reason == "Expiring"
    broken = adapter("3.0.0", policy=None, reason="DigestMismatch")
    assert plan(old, [old, NEW, broken]).reason == "Expiring"


def test_a_deletion_is_announced_at_least_one_hour_ahead() -> None:
    first = plan(OLD, [OLD, NEW])
    assert (first.action, first.reason, first.pruned_after) == ("archive", "Expiring", text(NOW + 3600))
    told = announced(OLD, NOW + 3600)
    assert plan(told, [told, NEW], now=NOW + 3599).action == "archive"
    gone = plan(told, [told, NEW], now=NOW + 3600)
    assert (gone.action, gone.reason) == ("prune", "Pruned")
    assert "unused since" in gone.message and "30d" in gone.message


def test_the_plan_for_an_unused_version_says_when_it_will_be_deleted() -> None:
    item = adapter("1.0.0", 2)
    found = plan(item, [item, NEW])
    assert (found.action, found.reason) == ("keep", "Expiring")
    assert found.pruned_after == text(NOW + 28 * DAY)
    assert found.next_look == 5 * DAY, "the next reconcile is when the version is compressed"
    assert "retention on support-2.0.0" in found.message


def test_a_use_after_the_announcement_restarts_the_retention_period() -> None:
    used_since = announced(adapter("1.0.0", 1), NOW - 1)
    found = plan(used_since, [used_since, NEW])
    assert (found.action, found.pruned_after) == ("keep", text(NOW + 29 * DAY))


def test_a_stricter_policy_announces_a_new_deletion_time() -> None:
    told = announced(OLD, NOW + 10 * DAY)
    found = plan(told, [told, NEW])
    assert found.pruned_after == text(NOW + 3600) and found.action != "prune"


def test_keep_counts_only_versions_that_can_be_served() -> None:
    policy = POLICY | {"keep": 2}
    versions = [
        adapter("1.0.0", 100, policy=policy), adapter("1.1.0", 100, policy=policy, reason="Archived"),
        adapter("1.2.0", 100, policy=policy, reason="Rejected"), adapter("1.3.0", 100, policy=policy),
    ]  # fmt: skip
    found = [plan(item, versions).reason for item in versions]
    assert found == ["Expiring", "Kept", "Expiring", "Needed"]


def test_a_version_that_failed_verification_is_kept() -> None:
    item = adapter("1.0.0", 1000, reason="DigestMismatch")
    assert plan(item, [item, NEW]) == Plan("keep")


def test_an_archived_version_is_deleted_when_its_retention_period_ends() -> None:
    item = adapter("1.0.0", 20, reason="Archived")
    found = plan(item, [item, NEW])
    assert (found.action, found.next_look) == ("keep", 10 * DAY)
    told = announced(item, NOW + 10 * DAY)
    assert plan(told, [told, NEW], now=NOW + 10 * DAY).action == "prune"


def test_without_unused_for_nothing_is_deleted() -> None:
    policy = {"compressAfter": "7d"}
    old, new = adapter("1.0.0", 900, policy=policy), adapter("2.0.0", policy=policy)
    found = plan(old, [old, new, adapter("1.5.0", policy=policy)])
    assert (found.action, found.pruned_after) == ("archive", None)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (deployment("support@1.0.0"), "support@1.0.0 in AdapterDeployment desk may refer to it"),
        (deployment("support@^1"), "support@^1 in AdapterDeployment desk may refer to it"),
        (deployment("support@1"), "support@1 in AdapterDeployment desk may refer to it"),
        (deployment("support@2.0.0", adapters=[{"ref": "support@1.0.0", "name": "support-1.0.0"}]), "used by desk"),
        (deployment("support@2.0.0", models=[{"model": "m", "adapter": "support-1.0.0"}]), "used by desk"),
        (deployment("x@1", replicaStatus=[{"adapters": [{"adapter": "support-1.0.0", "state": "Draining"}]}]), "used by desk"),
        (deployment("x@1", adapters=[{"ref": "x@1", "restoring": "support-1.0.0"}]), "used by desk"),
        (deployment("support@2.0.0", models=[{"adapter": "support-2.0.0"}]), "a rollback of support-2.0.0 would use it"),
    ],
)  # fmt: skip
def test_a_version_that_a_deployment_needs_is_kept(where: dict[str, Any], why: str) -> None:
    told = announced(OLD, NOW - 1)
    found = plan(told, [told, NEW], where)
    assert (found.action, found.reason, found.message) == ("keep", "Needed", f"kept: {why}")
    assert found.pruned_after is None


def test_the_version_that_was_served_before_is_kept_for_a_rollback() -> None:
    before, between = announced(adapter("1.0.0", 60), NOW - 1), announced(adapter("1.1.0", 100), NOW - 1)
    served = deployment("support@2.0.0", models=[{"adapter": "support-2.0.0"}])
    versions = [before, between, adapter("0.9.0", 90), NEW]
    assert "last version in use" in plan(before, versions, served).message
    assert "a rollback of support-2.0.0" in plan(between, versions, served).message


def test_parents_and_the_versions_that_jobs_compare_with_are_kept() -> None:
    told = announced(OLD, NOW - 1)
    for parents in ({"support@1.0.0"}, {"support-1.0.0"}, {"support@^1"}):
        assert plan(told, [told, NEW], parents=parents).reason == "Needed"
    assert plan(told, [told, NEW], compared={told.spec.artifact.digest}).reason == "Needed"
    running = {"spec": {"compose": {"linear": [{"adapter": "support@1.0.0", "weight": 1}]}}}
    done = running | {"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Verified"}]}}
    assert retention.composing([running, {"spec": {}}]) == {"support@1.0.0"}
    assert retention.composing([done]) == set()
    chosen = running | {"status": {"parents": [{"name": "support-1.0.0", "uri": "s3://b/p/"}], "conditions": []}}
    assert retention.composing([chosen]) == {"support@1.0.0", "support-1.0.0"}
    broken = {"type": "Ready", "status": "False", "reason": "DigestMismatch"}
    assert retention.composing([running | {"status": {"artifact": {"uri": "u"}, "conditions": [broken]}}]) == set()
    failed = running | {"status": {"stage": "Failed", "conditions": []}}
    assert retention.composing([failed]) == set()  # a failed composition does not read its parents again


@pytest.mark.parametrize("end", ["", "/", "/model"])
def test_the_source_of_a_base_model_is_kept(end: str) -> None:
    told = announced(OLD, NOW - 1)
    assert told.spec.artifact is not None
    models = [{"metadata": {"name": "merged"}, "spec": {"source": told.spec.artifact.uri.rstrip("/") + end}}]
    other = [{"metadata": {"name": "tiny"}, "spec": {"source": "s3://graft/shop/adapters/support/1.0.0-rc"}}]
    kept = plan(told, [told, NEW], models=models)
    assert (kept.reason, kept.message) == ("Needed", "kept: its files are those of BaseModel merged")
    assert plan(told, [told, NEW], models=other).action == "prune"


def test_a_resolved_parent_is_kept_when_a_newer_version_appears() -> None:
    """The reference now matches the newer version, but the Job still reads the files of the older one."""
    newer, told = adapter("1.5.0"), announced(OLD, NOW - 1)
    parents = {"spec": {"compose": {"parents": [{"adapter": "support@^1"}]}}, "status": {"conditions": []}}
    before = retention.composing([parents])
    assert plan(told, [told, newer, NEW], parents=before).action == "prune"
    parents["status"] = {"parents": [{"name": told.metadata.name}], "conditions": []}
    assert plan(told, [told, newer, NEW], parents=retention.composing([parents])).reason == "Needed"


@pytest.mark.parametrize(
    ("reference", "back"),
    [
        ("support@1.0.0", "1.0.0"),
        ("support@1.1.0", "1.1.0"),
        ("support-1.0.0", "1.0.0"),
        ("support@^1", "1.1.0"),
        ("support@1", "1.1.0"),
        ("support@latest", None),  # 2.0.0 is Ready
        ("support@^2", None),
        ("sales@^1", None),
        ("cat", None),
    ],
)
def test_a_composition_restores_the_archived_version_that_it_waits_for(reference: str, back: str | None) -> None:
    versions = [adapter("1.0.0", reason="Archived"), adapter("1.1.0", reason="Archived"), adapter("2.0.0")]
    restored = [item.spec.version for item in versions[:2] if retention.awaited(item, versions, {reference})]
    assert restored == ([back] if back else [])


def scenario(source: random.Random) -> tuple[list[Adapter], list[AdapterDeployment], list[dict[str, Any]]]:
    """Return a random namespace: versions of all kinds, and deployments that name them, serve them or lag behind."""
    numbers = source.sample(
        [f"{a}.{b}.{c}" for a in range(1, 4) for b in range(3) for c in range(3)], source.randint(1, 9)
    )
    policy = POLICY | {"keep": source.randint(1, 3)}
    versions = []
    for version in numbers:
        item = adapter(
            version, source.choice([0, 10, 100]), policy=policy, base=source.choice(["sha256:one", "sha256:two"]),
            reason=source.choice(["Verified"] * 4 + ["Archived"] * 2 + ["Rejected", "DigestMismatch"]),
            **({"baseVersions": source.choice(["^1", "1.0.0"])} if source.random() < 0.4 else {}),
        )  # fmt: skip
        versions.append(announced(item, NOW - 1) if source.random() < 0.9 else item)
    deployments, raws = [], []
    for index in range(source.randint(0, 3)):
        some = source.choice(numbers)
        ref = source.choice([some, f"^{some}", f"^{some[:1]}", some[:3], some[:1], "latest"])
        raw = deployment(f"support@{ref}", name=f"d{index}")
        if source.random() < 0.6:
            names = source.sample([item.metadata.name for item in versions], source.randint(1, min(2, len(versions))))
            raw["status"] = {
                "models": [{"model": "m", "adapter": names[0]}],
                "replicaStatus": [
                    {"pod": "p", "ready": True, "adapters": [{"adapter": name, "state": "Loaded"} for name in names]}
                ],
            }
        raws.append(raw)
        deployments.append(AdapterDeployment.model_validate(raw))
    return versions, deployments, raws


BASES = [
    BaseModelRef(name="tiny", uri="s3://m", digest=digest, version=version)
    for digest in ("sha256:one", "sha256:two", "sha256:three")
    for version in (None, "1.0.0", "1.4.0", "2.0.0")
]


def needed_by_hand(versions: list[Adapter], deployments: list[AdapterDeployment]) -> set[str]:
    """Return the versions that must be kept, computed independently of `needs`.

    They are the versions that serving would choose on any files of the base model, the versions that a status names,
    the versions that a rollback would use, and the newest versions.
    """
    names = set()
    for item, base in itertools.product(deployments, BASES):
        for found in resolve(item, versions, base):
            names |= {picked.metadata.name for picked in (found.adapter, found.restoring) if picked is not None}
    named = {name for item in deployments for name in retention.texts(item.status.wire())} & {
        item.metadata.name for item in versions
    }
    for item in versions:
        older = [other for other in versions if number(other) < number(item) and state(other) in {"ready", "archived"}]
        if item.metadata.name in named and older:
            names.add(max(older, key=number).metadata.name)
    names |= named | {max(versions, key=number).metadata.name}
    ready = [item for item in versions if state(item) == "ready"]
    return names | ({max(ready, key=number).metadata.name} if ready else set())


def test_in_random_scenarios_no_needed_version_is_archived_or_deleted() -> None:
    counted = dict.fromkeys(("keep", "archive", "prune"), 0)
    for seed in range(500):
        versions, deployments, raws = scenario(random.Random(seed))
        needed, by_hand = needs(versions, raws), needed_by_hand(versions, deployments)
        for item in versions:
            action = decide(item, versions, needed, NOW).action
            counted[action] += 1
            assert action == "keep" or item.metadata.name not in by_hand, (
                f"seed {seed}: {item.metadata.name} is still needed"
            )
        # Delete every version that may be deleted. Every reference must still resolve to the same version.
        left = [item for item in versions if decide(item, versions, needed, NOW).action != "prune"]
        for user, base in itertools.product(deployments, BASES):
            before, after = resolve(user, versions, base), resolve(user, left, base)
            assert [(item.adapter, item.restoring) for item in before] == [
                (item.adapter, item.restoring) for item in after
            ]
    assert min(counted.values()) > 50, f"the scenarios must lead to every action often enough: {counted}"
