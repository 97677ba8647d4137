"""Decide when a deployment's pods change to new files of their base model (PURE).

A BaseModel can change while a deployment serves it. The pods are rolled only if every entry of spec.adapters that
resolves on their present files also resolves on the new files. Until then they stay (`in_force`). During the roll, each
pod counts only for the adapters that fit its own files (`unfit`). So a route leads to the old version on old pods until
the new pods can take over.
"""

from dataclasses import dataclass

from graft.api import Adapter, AdapterDeployment
from graft.bounded import OutOfBounds
from graft.contracts.agent import engine_name
from graft.contracts.message import BaseModelRef
from graft.manifests.metadata import Manifest
from graft.manifests.serving import BASE_MODEL
from graft.reconcile.adapter.compatibility import fits
from graft.reconcile.adapterdeployment.serving import Resolution, resolve


def base_of(manifest: Manifest | None) -> BaseModelRef | None:
    """Return the base model that a pod or a pod template was made with, or None if it is not recorded."""
    text = ((manifest or {}).get("metadata", {}).get("annotations") or {}).get(BASE_MODEL)
    try:
        return BaseModelRef.read(text) if text else None
    except OutOfBounds:
        return None


@dataclass(frozen=True)
class InForce:
    """The base model that pods are made with, and what the entries resolve to on it.

    `held` says why the pods stay on old files.
    """

    base: BaseModelRef | None
    resolutions: list[Resolution]
    held: str | None = None


def in_force(
    deployment: AdapterDeployment, adapters: list[Adapter], current: BaseModelRef | None, live: BaseModelRef | None
) -> InForce:
    """Return the base model that pods are made with, and what the entries resolve to on it.

    `current`: the BaseModel as it is now, None if it cannot be used. `live`: what the pods were made with, None without
    pods.
    """
    if current is None:
        return InForce(None, resolve(deployment, adapters, live))
    after = resolve(deployment, adapters, current)
    if live is None:
        return InForce(current, after)
    if live.identity == current.identity:
        # The files are the same. A changed spec.version alone is no reason to replace the pods.
        return InForce(current.model_copy(update={"version": live.version}), after)
    before = resolve(deployment, adapters, live)
    lost = [new for old, new in zip(before, after, strict=True) if old.adapter is not None and new.adapter is None]
    if not lost:
        return InForce(current, after)
    text = (
        f"BaseModel {current.name} is now {current.identity}. The pods stay on {live.identity} until every adapter fits: "
        f"{'; '.join(item.message for item in lost)}"
    )
    return InForce(live, before, text)


def unfit(tenant: str, adapters: list[Adapter], pod: Manifest, current: BaseModelRef | None) -> frozenset[str]:
    """Return the engine names of the adapters that do not fit the files of this pod.

    They get no traffic, even if it has loaded them.
    """
    base = base_of(pod)
    if base is None:
        return frozenset()
    if current is not None and current.identity == base.identity:
        base = current  # spec.version may have been set or changed since the pod was made
    return frozenset(
        engine_name(tenant, item.metadata.name, item.published.digest)
        for item in adapters
        if item.artifact is not None and not fits(item, base)
    )
