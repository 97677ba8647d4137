"""Decide which versions of an adapter stay, are compressed, or are deleted (PURE).

`needs` returns why a version must stay as it is. Such a version is never changed. In doubt, `needs` keeps a version: it
searches all fields of a deployment for names and references, and it keeps the newest version of each kind that a
reference could mean. For all other versions, `decide` applies the policy, the time since the last use, and the number
of newer versions.

A deletion is announced: its time is written to the status first (`promised`), and nothing is deleted before that time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from graft.api import Adapter
from graft.api.retention import Retention, seconds
from graft.manifests.metadata import Manifest
from graft.reconcile.adapter.versions import matches, parse
from graft.status import find

NOTICE = 3600  # seconds from the announcement to the deletion, unless the policy's unusedFor is shorter
TIME = "%Y-%m-%dT%H:%M:%SZ"
State = Literal["ready", "archived", "rejected", "other"]
Said = tuple[str, str]  # the name of a field, and a string in it


@dataclass(frozen=True)
class Plan:
    """What happens to a version.

    `next_look`: seconds until the next decision. `reason`: of the condition Retained, None without a policy.
    """

    action: Literal["keep", "archive", "prune"]
    reason: str | None = None
    message: str = ""
    pruned_after: str | None = None
    next_look: float | None = None


def number(adapter: Adapter) -> tuple[int, int, int]:
    """Return the version as three numbers."""
    return parse(adapter.spec.version) or (0, 0, 0)


def state(adapter: Adapter) -> State:
    """Return the result of the verification.

    A version in state `other` is not verified, or invalid. It is never changed: a user must check it.
    """
    ready = find(adapter.status.conditions, "Ready")
    if ready is None:
        return "other"
    if ready.status == "True":
        return "ready"
    named: dict[str, State] = {"Archived": "archived", "Restoring": "archived", "Rejected": "rejected"}
    return named.get(ready.reason, "other")


def unused_since(adapter: Adapter) -> float:
    """Return the time of the last use, or of the creation if it was never used, in seconds since the epoch."""
    return _parse(adapter.status.last_used_time or adapter.metadata.creation_timestamp or "9999-01-01T00:00:00Z")


def policy_in_force(versions: Iterable[Adapter]) -> Retention | None:
    """Return the retention policy of the newest Ready version."""
    ready = [item for item in versions if state(item) == "ready" and not item.metadata.deletion_timestamp]
    return max(ready, key=number).spec.retention if ready else None


def said(value: Any, field: str = "") -> set[Said]:
    """Return every string in a value, with the name of the field that contains the string or its list."""
    if isinstance(value, dict):
        return set().union(*(said(item, key) for key, item in value.items()))
    if isinstance(value, list):
        return set().union(*(said(item, field) for item in value))
    return {(field, value)} if isinstance(value, str) else set()


def texts(value: Any) -> set[str]:
    """Return every string in a value."""
    return {text for _, text in said(value)}


def composing(adapters: Iterable[Manifest]) -> set[str]:
    """Return what unfinished compositions name: references to their parents, and the parents once they are chosen.

    The chosen parents are listed as well, because a reference may match a newer version by now.
    """
    named: set[str] = set()
    for raw in adapters:
        if not _settled(raw):
            named |= texts(raw["spec"].get("compose"))
            named |= {parent["name"] for parent in raw.get("status", {}).get("parents") or []}
    return named


def awaited(adapter: Adapter, versions: list[Adapter], parents: Iterable[str]) -> bool:
    """Return whether a composition waits until this Archived version is restored.

    It was chosen as a parent, or it is the newest match of a reference that matches only Archived versions.
    """
    present = [item for item in versions if not item.metadata.deletion_timestamp]
    for parent in parents:
        if parent == adapter.metadata.name:
            return True
        name, at, wanted = parent.partition("@")
        if not at or name != adapter.spec.adapter or not _is_reference(wanted):
            continue
        meant = [
            item for item in present if matches(wanted, item.spec.version) and state(item) in {"ready", "archived"}
        ]
        if meant and all(state(item) == "archived" for item in meant):
            newest = max(meant, key=number)
            if newest.metadata.name == adapter.metadata.name:
                return True
    return False


def _settled(raw: Manifest) -> bool:
    status = raw.get("status", {})
    conditions = status.get("conditions", [])
    if status.get("stage") == "Failed" or status.get("artifact"):  # it does not read its parents' files again
        return True
    return any(
        item["type"] == "Ready"
        and (item["status"] == "True" or item["reason"] in {"Archived", "Restoring", "Rejected"})
        for item in conditions
    )


def users(name: str, deployments: Iterable[Manifest]) -> list[str]:
    """Return the deployments whose status names a version: as resolved, routed, loaded or to be restored."""
    return sorted(raw["metadata"]["name"] for raw in deployments if name in texts(raw.get("status")))


def read_by(adapter: Adapter, models: Iterable[Manifest]) -> list[str]:
    """Return the BaseModels whose source is the version's files. Such a version holds a whole model."""
    uri = adapter.artifact.uri if adapter.artifact is not None else None
    return sorted(
        raw["metadata"]["name"] for raw in models if uri and f"{raw['spec']['source'].rstrip('/')}/".startswith(uri)
    )


def needs(
    versions: list[Adapter],
    deployments: list[Manifest],
    parents: Iterable[str] = (),
    compared: Iterable[str] = (),
    models: Iterable[Manifest] = (),
) -> dict[str, str]:
    """Return the names of the Adapters that must stay, each with the reason.

    `versions`: all of one adapter. `parents`: names or references in compositions. `compared`: digests of versions that
    running jobs compare their own version with. `models`: the BaseModels.
    """
    needed: dict[str, str] = {}
    present = sorted((item for item in versions if not item.metadata.deletion_timestamp), key=number)
    if not present:
        return needed

    def need(item: Adapter, why: str) -> None:
        needed.setdefault(item.metadata.name, why)

    said = {raw["metadata"]["name"]: texts(raw.get("status")) for raw in deployments}
    for item in present:
        if by := sorted(name for name, names in said.items() if item.metadata.name in names):
            need(item, f"used by {', '.join(by)}")
    servable = [item for item in present if state(item) in {"ready", "archived"}]
    _needed_for_rollback(present, servable, set(needed), need)
    for raw in deployments:
        for ref in sorted(texts(raw["spec"])):
            _needed_by_reference(
                ref, present, servable, f"{ref} in AdapterDeployment {raw['metadata']['name']} may refer to it", need
            )
    for parent in sorted(parents):
        _needed_by_reference(parent, present, servable, "a composition uses it as a parent", need)
        for item in present:
            if item.metadata.name == parent:
                need(item, "a composition uses it as a parent")
    for item in present:
        if item.artifact is not None and item.artifact.digest in set(compared):
            need(item, "a running FineTuneJob compares its own version with it")
        if names := read_by(item, models):
            need(item, f"its files are those of BaseModel {', '.join(names)}")
    ready = [item for item in present if state(item) == "ready"]
    for newest in (present[-1:], servable[-1:], ready[-1:]):
        for item in newest:
            need(item, "it is the newest")
    return needed


def is_newest(adapter: Adapter, versions: list[Adapter]) -> bool:
    """Return whether it is the newest version that may be served. Jobs compare their own version with that one."""
    present = [item for item in versions if not item.metadata.deletion_timestamp]
    servable = [item for item in present if state(item) in {"ready", "archived"}]
    return bool(servable) and max(servable, key=number).metadata.name == adapter.metadata.name


def _needed_for_rollback(present: list[Adapter], servable: list[Adapter], used: set[str], need: Any) -> None:
    """Mark the version before each used version, and the unused version that was used last."""
    for item in present:
        if item.metadata.name in used:
            for before in [other for other in servable if number(other) < number(item)][-1:]:
                need(before, f"a rollback of {item.metadata.name} would use it")
    idle = [item for item in servable if item.metadata.name not in used and item.status.last_used_time]
    if used and idle:
        need(max(idle, key=unused_since), "it was the last version in use before, and a rollback would use it")


def _needed_by_reference(ref: str, present: list[Adapter], servable: list[Adapter], why: str, need: Any) -> None:
    """Mark the versions that a reference may mean. An exact reference means that version.

    A range may mean, depending on the base model, the newest of the versions that fit the same base models.
    """
    name, at, wanted = ref.partition("@")
    if not at or name != present[0].spec.adapter or not _is_reference(wanted):
        return
    for item in present:
        if item.spec.version == wanted:
            need(item, why)
    alike: dict[tuple[Any, ...], Adapter] = {}
    for item in servable:
        if matches(wanted, item.spec.version):
            spec = item.spec
            # Keep the newest version of each kind, and the newest Ready one: it answers while an archived one is
            # restored.
            for kind in ("any", state(item)):
                alike[kind, spec.base_model, item.status.base_model_digest, spec.base_versions, spec.method] = item
    for item in alike.values():
        need(item, why)


def _is_reference(wanted: str) -> bool:
    return wanted == "latest" or all(part.isdigit() for part in wanted.removeprefix("^").split("."))


def decide(adapter: Adapter, versions: list[Adapter], needed: dict[str, str], now: float) -> Plan:
    """Return what happens to one of the versions now. `now`: seconds since the epoch."""
    policy, name, seen = policy_in_force(versions), adapter.metadata.name, state(adapter)
    if policy is None or seen == "other" or adapter.metadata.deletion_timestamp:
        return Plan("keep")
    if name in needed:
        return Plan("keep", "Needed", f"kept: {needed[name]}")
    since = unused_since(adapter)
    looks: list[float] = []
    kept = _keep_or_prune(adapter, versions, policy, now)
    if kept.action == "prune":
        return kept
    if kept.pruned_after:
        looks.append(_parse(kept.pruned_after) - now)
    if policy.compress_after and seen != "archived":
        due = since + seconds(policy.compress_after)
        if due <= now:
            return Plan("archive", kept.reason, kept.message, kept.pruned_after, kept.next_look)
        looks.append(due - now)
    return Plan("keep", kept.reason, kept.message, kept.pruned_after, min(looks, default=None))


def _keep_or_prune(adapter: Adapter, versions: list[Adapter], policy: Retention, now: float) -> Plan:
    newest_first = sorted(versions, key=number, reverse=True)
    servable = [item.metadata.name for item in newest_first if state(item) in {"ready", "archived"}]
    if adapter.metadata.name in servable[: policy.keep]:
        return Plan("keep", "Kept", f"kept: one of the newest {policy.keep} versions (spec.retention.keep)")
    if policy.unused_for is None:
        return Plan("keep", "Kept", "kept: the policy that applies does not set spec.retention.unusedFor")
    since, allowed = unused_since(adapter), seconds(policy.unused_for)
    due, notice = since + allowed, min(NOTICE, allowed)
    retained = find(adapter.status.conditions, "Retained")
    announced = retained is not None and retained.status == "False" and adapter.status.pruned_after
    promised = _parse(adapter.status.pruned_after or "") if announced else None
    if promised is None or promised < due or promised > max(due, now + notice):
        # Announce the deletion now. An earlier announcement is void if the version was used or the policy changed.
        promised = max(due, now + notice)
    elif promised <= now:
        text = f"deleted with its files: unused since {_text(since)}, longer than {policy.unused_for} (spec.retention.unusedFor)"
        return Plan("prune", "Pruned", text, _text(promised))
    text = (
        f"unused since {_text(since)}. It is deleted with its files after {_text(promised)} (spec.retention.unusedFor is "
        f"{policy.unused_for}). To keep it, refer to it in an AdapterDeployment, or change spec.retention on "
        f"{_newest_ready(versions)}"
    )
    return Plan("keep", "Expiring", text, _text(promised))


def _newest_ready(versions: list[Adapter]) -> str:
    return max((item for item in versions if state(item) == "ready"), key=number).metadata.name


def _parse(text: str) -> float:
    return datetime.strptime(text, TIME).replace(tzinfo=UTC).timestamp()


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(TIME)
