"""Which adapters fit which files of a base model (PURE), and when a deployment's pods may move on to new ones.

An adapter is an update of the very weights that it was tuned on. It fits a base model whose digest (or commit) is the recorded one, under
whatever name; and one of the same name whose spec.version lies in the adapter's spec.baseVersions: that somebody has to promise.

A BaseModel may change under a deployment. Its pods are rolled only when every entry of spec.adapters that resolves on the files they
have resolves on the new ones, too; until then they stay (`in_force`). During the roll each pod counts for the adapters that fit its
own files only (`unfit`), so a route leads to the old version on old pods until the new pods can take over.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from graft.api import Adapter, AdapterDeployment, BaseModel
from graft.api.adapter import CompatibleBase
from graft.contracts.agent import engine_name
from graft.contracts.message import BaseModelRef
from graft.manifests.metadata import Manifest
from graft.manifests.serving import BASE_MODEL
from graft.reconcile.adapterdeployment.serving import Resolution, fits, resolve
from graft.reconcile.shared.access import Base, base_model_of


def compatible_bases(adapter: Adapter, models: list[BaseModel]) -> list[CompatibleBase]:
    """What an Adapter's status says that it fits now."""
    found = [base_model_of(model.metadata.name, adapter.metadata.namespace, model) for model in models]
    refs = [base.ref for base in found if isinstance(base, Base)]
    fitting = sorted((ref for ref in refs if fits(adapter, ref)), key=lambda ref: ref.name)
    return [CompatibleBase(name=ref.name, version=ref.version, digest=ref.identity) for ref in fitting]


def base_of(manifest: Manifest | None) -> BaseModelRef | None:
    """The base model that a pod, or a pod template, was made with; None where nothing tells."""
    text = ((manifest or {}).get("metadata", {}).get("annotations") or {}).get(BASE_MODEL)
    try:
        return BaseModelRef.model_validate_json(text) if text else None
    except ValidationError:
        return None


@dataclass(frozen=True)
class InForce:
    """The base model that pods are made with, and what the entries stand for on it; `held` says why the pods wait."""

    base: BaseModelRef | None
    resolutions: list[Resolution]
    held: str | None = None


def in_force(
    deployment: AdapterDeployment, adapters: list[Adapter], current: BaseModelRef | None, live: BaseModelRef | None
) -> InForce:
    """`current` is the BaseModel as it is now (None while it cannot be had), `live` what the pods are made with (None without pods)."""
    if current is None:
        return InForce(None, resolve(deployment, adapters, live))
    after = resolve(deployment, adapters, current)
    if live is None:
        return InForce(current, after)
    if live.identity == current.identity:
        # The same files: another name for their version is no reason to make the pods anew.
        return InForce(current.model_copy(update={"version": live.version}), after)
    before = resolve(deployment, adapters, live)
    lost = [new for old, new in zip(before, after, strict=True) if old.adapter is not None and new.adapter is None]
    if not lost:
        return InForce(current, after)
    text = (
        f"BaseModel {current.name} is now {current.identity}; the pods stay on {live.identity} until every adapter fits: "
        f"{'; '.join(item.message for item in lost)}"
    )
    return InForce(live, before, text)


def unfit(tenant: str, adapters: list[Adapter], pod: Manifest, current: BaseModelRef | None) -> frozenset[str]:
    """Engine names of the adapters that do not fit the files of this pod; whatever it has loaded of them never gets traffic."""
    base = base_of(pod)
    if base is None:
        return frozenset()
    if current is not None and current.identity == base.identity:
        base = current  # the version may have been given, or changed, since the pod was made
    return frozenset(
        engine_name(tenant, item.metadata.name, item.published.digest)
        for item in adapters
        if item.artifact is not None and not fits(item, base)
    )
