"""Make the files of an Adapter that is composed or imported. After that, it is verified like any other Adapter.

    wait for base model, storage key and parents -> choose the parents' versions (status.parents)
    -> ConfigMap, NetworkPolicy, Job -> follow its pod
    -> manifest.json in storage, written by this Adapter's Job -> status.artifact

As with a FineTuneJob, each reconcile finds the current step from what exists. A failed version is not retried. Its spec
is immutable, so the remedy is another Adapter.
"""

from dataclasses import dataclass

from graft.api import Adapter
from graft.api.adapter import AdapterArtifact, AdapterStatus, ResolvedParent
from graft.api.composition import EQUAL_RANKS, Compose, ComposeParent
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts.message import BaseModelRef
from graft.contracts.progress import Reason
from graft.kube import KubeError, Manifest
from graft.manifests import adapterjob as manifests
from graft.manifests.metadata import OWNER_UID
from graft.manifests.training import is_edited
from graft.reconcile.adapter.versions import matches, parse
from graft.reconcile.shared import pods, scheduling
from graft.reconcile.shared.access import Base, Trouble, ensure_credentials, gather_base_model, refusal_of
from graft.reconcile.shared.context import SOON, WAITING, Context
from graft.reconcile.shared.jobs import condition_of, keep, not_started, pods_of, refusal, steer
from graft.reconcile.shared.publishing import COPYING, Copying
from graft.reconcile.shared.publishing import published as published_by
from graft.reconcile.shared.stored import valid
from graft.status import condition, find

KIND = "Adapter"
# Reasons of faults that retries cannot fix.
FINAL = {"OutsideNamespace", "ParentsIncompatible", "VersionExists"}
LOW_RANK = {"lora", "qlora"}


@dataclass(frozen=True)
class Step:
    """The result of a reconcile. `again`: seconds until the next reconcile, None to wait for an event."""

    status: AdapterStatus
    ready: Condition
    again: float | None


async def make(ctx: Context, adapter: Adapter) -> Step:
    """Reconcile a version that has no files yet."""
    namespace, labels = adapter.metadata.namespace, {OWNER_UID: adapter.metadata.uid}
    children = await ctx.cache.list("Job", namespace, labels, owner=adapter.metadata.uid)
    ended = bool(children) and any(
        condition_of(children[0], kind).get("status") == "True" for kind in ("Complete", "Failed", "FailureTarget")
    )
    if not children or ended:
        try:
            found = await _published(ctx, adapter)
            if found == "copying":
                return working(adapter, COPYING)
        except StoreError as error:
            return waiting(
                adapter,
                Trouble(
                    "StorageUnavailable",
                    f"cannot check whether the version is published, the operator retries: {error}",
                ),
            )
        if isinstance(found, Trouble):
            return waiting(adapter, found)
        if found is not None:
            return published(adapter, found[1], ctx.store.config.bucket)
    if not children:
        return await _start(ctx, adapter)
    if not ended:
        await steer(ctx, children[0], parallelism=1)
        await _keep(ctx, adapter)
    own = await pods_of(ctx, namespace, adapter.metadata.uid, children)
    refused = await (not_started(ctx, own) if own else refusal(ctx, namespace, children[0]["metadata"]["uid"]))
    return observe(adapter, children[0], own, refused)


async def _start(ctx: Context, adapter: Adapter) -> Step:
    """Choose the parents, then create the ConfigMap, the NetworkPolicy and the Job."""
    namespace = adapter.metadata.namespace
    base = await gather_base_model(ctx, adapter.spec.base_model, namespace)
    if isinstance(base, Trouble):
        return waiting(adapter, base)
    if (outside := outside_namespace(adapter, ctx.store.config.bucket)) is not None:
        return waiting(adapter, outside)
    path = "spec.compose" if adapter.spec.compose is not None else "spec.import"
    if (refused := scheduling.forbidden(manifests.making(adapter), ctx.settings.allowed, path)) is not None:
        return waiting(adapter, refused)
    if (trouble := await ensure_credentials(ctx, namespace)) is not None:
        return waiting(adapter, trouble)
    adapters = valid(Adapter, await ctx.cache.list(KIND, namespace))
    if adapter.spec.compose is not None and adapter.status.parents is None:
        chosen = resolve(adapter, adapter.spec.compose, adapters, base.ref)
        if isinstance(chosen, Trouble):
            return waiting(adapter, chosen)
        status = adapter.status.model_copy(update={"parents": chosen, "stage": stage(adapter)})
        text = f"combines {', '.join(f'{item.name} x {item.weight:g}' for item in chosen)}"
        return Step(status, condition(KIND, "Ready", "Unknown", stage(adapter), text), 0)
    try:
        await _create(ctx, adapter, base, adapters)
    except KubeError as error:
        if (refusal := refusal_of(ctx, namespace, "the Job", error)) is None:
            raise
        return waiting(adapter, refusal)
    return working(adapter, "the operator has created the Job")


async def _create(ctx: Context, adapter: Adapter, base: Base, adapters: list[Adapter]) -> None:
    names = {item.name for item in adapter.status.parents or []}
    sizes = sum(item.status.size_bytes or 0 for item in adapters if item.metadata.name in names)
    needs = manifests.resources(adapter, base.model.status, sizes)
    file = manifests.version_file(adapter, base.ref, base.model.status, base.model.spec.task, ctx.settings)
    await ctx.kube.ensure(manifests.config_map(adapter, file), manifests.policy(adapter, ctx.settings))
    await ctx.kube.create(manifests.job(adapter, base.ref, ctx.settings, needs))


async def _keep(ctx: Context, adapter: Adapter) -> None:
    """Repair what the pod of the running Job needs. A job.json that nobody has edited stays: the attempts of a Job share it."""
    namespace = adapter.metadata.namespace
    needed = [manifests.policy(adapter, ctx.settings)]
    live = await ctx.cache.get("ConfigMap", namespace, manifests.job_name(adapter))
    if live is None or is_edited(live):
        base = await gather_base_model(ctx, adapter.spec.base_model, namespace)
        if isinstance(base, Base):
            file = manifests.version_file(adapter, base.ref, base.model.status, base.model.spec.task, ctx.settings)
            needed.append(manifests.config_map(adapter, file))
    await keep(ctx, namespace, *needed)


async def _published(ctx: Context, adapter: Adapter) -> tuple[AdapterManifest, str] | Trouble | Copying | None:
    """Return the manifest of the version that this Adapter's Job has made, and its digest. None if there is none.

    Return "copying" while the operator publishes it, and Trouble if another manifest is stored under the version's
    prefix. Raises StoreError.
    """
    spec, meta = adapter.spec, adapter.metadata
    prefix = layout.adapter_prefix(layout.tenant_of(meta.namespace), spec.adapter, spec.version)
    try:
        found = await published_by(ctx, adapter, spec.adapter, spec.version)
    except InvalidArtifact as error:
        return Trouble("VersionExists", f"cannot publish {prefix}: {error}. Create an Adapter with another version")
    if found is None or found == "copying":
        return found
    manifest, digest = found
    if manifest.job.uid == meta.uid:
        return found
    return Trouble(
        "VersionExists",
        f"{spec.adapter} {spec.version} is already published, by {manifest.job.namespace}/{manifest.job.name}. Create an Adapter "
        f"with another version, or one with spec.artifact: {{uri: {layout.s3_uri(ctx.store.config.bucket, prefix)}, digest: {digest}}}",
    )


def outside_namespace(adapter: Adapter, bucket: str) -> Trouble | None:
    """Return why an import from another tenant's part of the bucket is refused, or None (PURE).

    The key could not read it anyway.
    """
    uri = adapter.spec.import_.uri if adapter.spec.import_ is not None else ""
    tenant = layout.tenant_of(adapter.metadata.namespace)
    if not layout.outside_tenants_part(uri, bucket, tenant):
        return None
    own = layout.s3_uri(bucket, layout.tenant_prefix(tenant))
    return Trouble(
        "OutsideNamespace",
        f"spec.import.uri: {uri} is outside this namespace's part of the bucket. Put the files below {own}",
    )


def resolve(
    adapter: Adapter, compose: Compose, adapters: list[Adapter], base: BaseModelRef
) -> list[ResolvedParent] | Trouble:
    """Return the newest Ready version for each parent's reference, or why these cannot be combined (PURE)."""
    found: list[Adapter] = []
    for parent in compose.parents:
        one = _resolve_one(adapter, parent, adapters)
        if isinstance(one, Trouble):
            return one
        found.append(one)
    if (problem := _incompatible(adapter, compose, found, base)) is not None:
        return Trouble("ParentsIncompatible", problem)
    return [
        ResolvedParent(
            name=item.metadata.name,
            version=item.spec.version,
            weight=parent.weight,
            uri=item.published.uri,
            digest=item.published.digest,
        )
        for parent, item in zip(compose.parents, found, strict=True)
    ]


def _resolve_one(adapter: Adapter, parent: ComposeParent, adapters: list[Adapter]) -> Adapter | Trouble:
    name, _, wanted = parent.adapter.partition("@")
    candidates = [
        item
        for item in adapters
        if item.spec.adapter == name
        and matches(wanted, item.spec.version)
        and item.metadata.uid != adapter.metadata.uid
        and not item.metadata.deletion_timestamp
    ]
    if not candidates:
        return Trouble(
            "ParentMissing",
            f"{parent.adapter}: no Adapter matches this parent in spec.compose. The operator continues when one does",
        )
    candidates.sort(key=lambda item: parse(item.spec.version) or (0, 0, 0))
    for item in reversed(candidates):
        ready = find(item.status.conditions, "Ready")
        if ready is not None and ready.status == "True" and item.artifact is not None:
            return item
    newest = candidates[-1]
    why = find(newest.status.conditions, "Ready")
    text = why.message if why is not None else "it is not verified yet"
    return Trouble("ParentNotReady", f"{parent.adapter}: Adapter {newest.metadata.name} is not Ready: {text}")


def _incompatible(adapter: Adapter, compose: Compose, parents: list[Adapter], base: BaseModelRef) -> str | None:
    """Return why these versions cannot be combined in this way and what to do, or None if they can."""
    names = [item.metadata.name for item in parents]
    if len(set(names)) < len(names):
        return f"the parents in spec.compose resolve to {', '.join(names)}. Name each version once, with the sum of its weights"
    for item in parents:
        if item.spec.method not in LOW_RANK:
            return (
                f"{item.metadata.name} was tuned with {item.spec.method}. Only lora and qlora versions can be combined"
            )
        if item.spec.base_model != adapter.spec.base_model:
            return (
                f"{item.metadata.name} belongs to the BaseModel {item.spec.base_model}, but spec.baseModel is "
                f"{adapter.spec.base_model}. Combine versions of one base model"
            )
    bases = [item.status.base_model_digest for item in parents]
    if len(set(bases)) > 1:
        told = ", ".join(f"{name} on {digest}" for name, digest in zip(names, bases, strict=True))
        return f"the parents were tuned on different revisions of {base.name}: {told}. Train them again on the same revision"
    if compose.into == "base" and bases[0] != (base.digest or base.uri):
        return (
            f"{names[0]} was tuned on {bases[0]}, but the BaseModel {base.name} is now {base.digest or base.uri}. Use a "
            "BaseModel of the earlier revision in spec.baseModel"
        )
    ranks = [item.status.rank for item in parents]
    if compose.method in EQUAL_RANKS and len(set(ranks)) > 1:
        told = ", ".join(f"{name} has rank {rank}" for name, rank in zip(names, ranks, strict=True))
        remedy = "cat or svd" if compose.method == "linear" else f"{compose.method}Svd"
        return f"spec.compose.method {compose.method} needs equal ranks, but {told}. Use method {remedy}"
    return None


def stage(adapter: Adapter) -> str:
    """Return the stage while the Job works. The condition Ready has the same reason (PURE)."""
    return "Composing" if adapter.spec.compose is not None else "Importing"


def waiting(adapter: Adapter, trouble: Trouble) -> Step:
    """Return the step of a version that cannot be made yet, or never (PURE)."""
    if trouble.reason in FINAL:
        return failed(adapter, trouble.reason, trouble.message)
    ready = condition(KIND, "Ready", "Unknown", trouble.reason, trouble.message)
    again = SOON if trouble.reason.startswith("Parent") else WAITING  # parents are often about to become Ready
    return Step(adapter.status.model_copy(update={"stage": "Waiting"}), ready, again)


def working(adapter: Adapter, message: str) -> Step:
    """Return the step of a version whose Job exists (PURE)."""
    name = stage(adapter)
    return Step(
        adapter.status.model_copy(update={"stage": name}), condition(KIND, "Ready", "Unknown", name, message), SOON
    )


def failed(adapter: Adapter, reason: str, message: str) -> Step:
    """Return the step of a version that can never be made (PURE)."""
    return Step(
        adapter.status.model_copy(update={"stage": "Failed"}), condition(KIND, "Ready", "False", reason, message), None
    )


def published(adapter: Adapter, digest: str, bucket: str) -> Step:
    """Return the step of a version whose files exist and are verified next (PURE)."""
    spec = adapter.spec
    prefix = layout.adapter_prefix(layout.tenant_of(adapter.metadata.namespace), spec.adapter, spec.version)
    artifact = AdapterArtifact(uri=layout.s3_uri(bucket, prefix), digest=digest)
    status = adapter.status.model_copy(update={"artifact": artifact, "stage": "Verifying"})
    return Step(
        status, condition(KIND, "Ready", "Unknown", "Verifying", "the operator verifies the published files"), 0
    )


def observe(adapter: Adapter, child: Manifest, own: list[Manifest], refused: str | None) -> Step:
    """Return the step of a version whose Job exists and has published nothing so far (PURE). `refused`: why there is no pod,
    or why its containers do not start."""
    name = "ComposeFailed" if adapter.spec.compose is not None else "ImportFailed"
    ending = next((end for pod in reversed(own) if (end := pods.ending(pod)) is not None), None)
    for type_ in ("Failed", "FailureTarget"):
        over = condition_of(child, type_)
        if over.get("status") != "True":
            continue
        if ending is None:
            return failed(adapter, name, f"the Job failed: {over.get('message') or over.get('reason')}")
        return failed(adapter, failure_reason(adapter, ending.reason), _told(ending))
    if condition_of(child, "Complete").get("status") == "True":
        return failed(adapter, name, "the pod succeeded, but its manifest.json is not in storage")
    if not own:
        return working(
            adapter,
            f"Kubernetes refuses the pod of the Job and retries: {refused}" if refused else "the Job has no pod yet",
        )
    newest = own[-1]
    if pods.phase(newest) == "Failed" and ending is not None:
        return working(adapter, f"pod {pods.name(newest)} failed, and another attempt follows: {_told(ending)}")
    return working(adapter, pods.waiting_message(newest) or refused or f"the pod of the Job is {pods.name(newest)}")


def failure_reason(adapter: Adapter, reason: str) -> str:
    """Return the condition's reason for a failure reason of the trainer (PURE)."""
    composed = adapter.spec.compose is not None
    if reason == Reason.VERSION_EXISTS:
        return "VersionExists"
    if reason == Reason.ADAPTER_INVALID:
        return "ParentsIncompatible" if composed else "ImportInvalid"
    return "ComposeFailed" if composed else "ImportFailed"


def _told(ending: pods.Ending) -> str:
    if ending.reason == Reason.OUT_OF_MEMORY:
        return f"{ending.message} Create the Adapter again with more memory in spec.compose.resources or spec.import.resources."
    return ending.text


async def unseen(ctx: Context, adapter: Adapter) -> AdapterArtifact | None:
    """Return what is published of the Job's version, for an Adapter that was deleted before its status showed it.

    Raises StoreError.
    """
    spec, meta = adapter.spec, adapter.metadata
    prefix = layout.adapter_prefix(layout.tenant_of(meta.namespace), spec.adapter, spec.version)
    try:
        manifest, digest = await ctx.stored(meta.namespace, read_manifest, prefix, None)
    except InvalidArtifact:
        return None
    except StoreError as error:
        if error.trouble != "missing":
            raise
        return None
    return published(adapter, digest, ctx.store.config.bucket).status.artifact if manifest.job.uid == meta.uid else None
