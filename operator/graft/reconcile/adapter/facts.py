"""What jobs and other versions must know of an Adapter without parsing it (PURE)."""

from typing import NamedTuple

from graft.kube import Manifest
from graft.manifests.adapter import ADAPTER_LABEL, RECIPE
from graft.reconcile.adapter.versions import Known
from graft.reconcile.shared.jobs import condition_of

PUT_AWAY = {"Archived", "Restoring"}  # reasons of the condition Ready


class VersionFacts(NamedTuple):
    """The facts of one version.

    `policy`: whether it has a retention policy, which may apply to all versions of its adapter. `waits`: whether its next
    step may depend on the other versions although none of them has a policy.
    """

    known: Known
    policy: bool
    waits: bool


def adapter_label(raw: Manifest) -> str:
    """Return the adapter of a version, by the label with which versions are listed."""
    return str((raw["metadata"].get("labels") or {}).get(ADAPTER_LABEL) or "")


def version_of(raw: Manifest) -> VersionFacts:
    """Return the facts of a stored Adapter. An older schema may have let any spec in."""
    spec, ready = raw.get("spec") or {}, condition_of(raw, "Ready")
    recipe = (raw["metadata"].get("annotations") or {}).get(RECIPE)
    known = Known(str(spec.get("version") or ""), recipe, str(spec.get("baseModel") or ""))
    composes = bool(spec.get("compose")) and ready.get("status") not in {"True", "False"}
    left = bool(condition_of(raw, "Retained"))  # of a policy that was removed: so is the condition
    return VersionFacts(known, bool(spec.get("retention")), composes or left or ready.get("reason") in PUT_AWAY)
