"""Decide on which base models an adapter may be served (PURE).

An adapter is an update of exactly those weights that it was tuned on. It fits a base model with the recorded digest (or
commit), under any name. It also fits a base model of the same name if that model's spec.version is in the adapter's
spec.baseVersions. The author of spec.baseVersions guarantees this.
"""

from graft.api import Adapter, BaseModel
from graft.api.adapter import CompatibleBase
from graft.contracts.message import BaseModelRef
from graft.reconcile.adapter.versions import matches
from graft.reconcile.claims import Claim
from graft.reconcile.shared.access import Base, base_model_of
from graft.status import find


def fits(adapter: Adapter, base: BaseModelRef) -> bool:
    """Return whether an adapter may be served on these files of a base model."""
    spec, tuned_on = adapter.spec, adapter.status.base_model_digest
    if tuned_on == base.identity:
        return True
    if spec.base_model != base.name:
        return False
    return tuned_on is None or bool(spec.base_versions and base.version and matches(spec.base_versions, base.version))


def compatible_bases(adapter: Adapter, models: list[BaseModel], tenant: Claim | None) -> list[CompatibleBase]:
    """Return the base models that an Adapter fits now, for its status. `tenant`: the one that has its namespace."""
    found = [base_model_of(model.metadata.name, adapter.metadata.namespace, model, tenant) for model in models]
    refs = [base.ref for base in found if isinstance(base, Base)]
    fitting = sorted((ref for ref in refs if fits(adapter, ref)), key=lambda ref: ref.name)
    return [CompatibleBase(name=ref.name, version=ref.version, digest=ref.identity) for ref in fitting]


def is_put_away(adapter: Adapter) -> bool:
    """Return whether the weights are Archived or Restoring, so that only their compressed copy certainly exists."""
    ready = find(adapter.status.conditions, "Ready")
    return ready is not None and ready.reason in {"Archived", "Restoring"}
