"""Reconcile an Adapter: verify and sign its files in storage before it is Ready.

Its deletion waits while a deployment serves it.
"""

from dataclasses import replace
from typing import Any

from graft.api import Adapter
from graft.api.adapter import AdapterStatus
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import InvalidArtifact
from graft.kube import Manifest
from graft.manifests.adapter import ADAPTER_LABEL
from graft.reconcile.adapter import adapterjob, lifecycle, signing, verification
from graft.reconcile.adapter.compatibility import is_put_away
from graft.reconcile.shared import backoff, ending
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import GATHER, SOON, WAITING, Context
from graft.status import condition, find, now, seconds_left

KIND = "Adapter"
# Verdicts that may change although the spec does not: the store may answer again, and files may still arrive.
RETRIED = {"StorageUnavailable", "ManifestMissing", "FileMissing", "SigningKeyUnavailable"}
UNREAD = (
    "base_model_digest",
    "rank",
    "target_modules",
    "stop_token_ids",
    "prompt_template",
    "size_bytes",
    "metrics",
    "score",
    "verified_at",
    "signature",
)


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one Adapter. Return the seconds until the next reconcile, or None to wait for an event."""
    raw = await ctx.cache.get(KIND, namespace, name)
    if raw is None:
        return None
    adapter = Adapter.model_validate(raw)
    # The label is missing on an Adapter that was created by hand. Versions are found by it.
    claimed = await ctx.claim(raw, {ADAPTER_LABEL: adapter.spec.adapter})
    if claimed is None:
        return None
    if claimed is not raw:
        raw, adapter = claimed, Adapter.model_validate(claimed)
    # The last look before its files are deleted is at the API server.
    reader = ctx.kube if adapter.metadata.deletion_timestamp else ctx.cache
    deployments = await reader.list("AdapterDeployment", namespace)
    used_by = serving(adapter, deployments)
    if adapter.metadata.deletion_timestamp:
        return await _clean_up(ctx, raw, adapter, used_by, deployments)
    ready = find(adapter.status.conditions, "Ready")
    if (outside := verification.outside_namespace(adapter, ctx.store.config.bucket)) is not None:
        return await _refuse(ctx, raw, adapter, outside, used_by)
    look = lifecycle.Look(ctx, raw, adapter, deployments, used_by, in_use(used_by))
    if ready is not None and is_put_away(adapter):
        if not verification.running(ctx, adapter):
            pause = await lifecycle.attend(look, ready)
            if pause is not None:
                return pause
        ready = None  # its files are restored, and are verified like new ones
    done = ready is not None and ready.observed_generation == adapter.metadata.generation and ready.status != "Unknown"
    settled = done and ready is not None and ready.reason not in RETRIED
    if adapter.artifact is None:
        if ready is not None and adapter.status.stage == "Failed":  # it stays Failed, even if its spec is edited
            status = adapter.status.model_copy(update={"used_by": used_by})
            await ctx.write_status(raw, status, [ready, in_use(used_by)])
            return None
        step = await adapterjob.make(ctx, adapter)
        await ctx.write_status(raw, step.status.model_copy(update={"used_by": used_by}), [step.ready, in_use(used_by)])
        return step.again
    if settled and ready is not None and not signing.doubtful(ctx, adapter, ready):
        status, again = await signing.renewed(ctx, adapter, ready)
        pause = await lifecycle.follow(replace(look, adapter=adapter.model_copy(update={"status": status})), ready)
        return min((item for item in (again, pause) if item is not None), default=None)
    told = lifecycle.use(adapter, used_by) | {"stored_bytes": None}
    if ctx.keys is None:  # it could not be signed, so its files are not read
        status = adapter.status.model_copy(update=told | {"stage": "Verifying"})
        await ctx.write_status(raw, status, [signing.unavailable(ctx), in_use(used_by)])
        return WAITING
    checked = verification.outcome(ctx, adapter) if _may_verify(ctx, adapter) else None
    if checked is None:
        await _show_verifying(ctx, raw, adapter, told)
        return max(SOON, _pause(ctx, adapter))
    archived = isinstance(checked, verification.Checked) and checked.archived
    status, verdict = observe(adapter, checked.manifest if isinstance(checked, verification.Checked) else checked)
    if archived and status.stage in {"Ready", "Rejected"}:
        if (
            verification.own_prefix(adapter, adapter.artifact, ctx.store.config.bucket) is None
        ):  # the operator never restores files outside the adapter's folder
            lost = InvalidArtifact("FileMissing", "the weights are in storage in compressed form only. Upload them")
            status, verdict = observe(adapter, lost)
        else:
            status, verdict = status.model_copy(update={"stage": "Archived"}), lifecycle.archived_condition()
    status, verdict = await signing.signed(ctx, ctx.keys, adapter, status, verdict)
    if verdict.reason not in RETRIED:
        told["compatibility"] = await lifecycle.compatibility(ctx, adapter.model_copy(update={"status": status}))
    await ctx.write_status(raw, status.model_copy(update=told), [verdict, in_use(used_by)])
    if verdict.reason in RETRIED:
        # An outage of the store is not the tenant's failure, so its versions continue soon after it.
        longest = backoff.OUTAGE if verdict.reason == "StorageUnavailable" else backoff.LAST
        return ctx.backoff.failed(adapter.metadata.uid, adapter.metadata.generation, longest)
    ctx.backoff.forget(adapter.metadata.uid)
    # A policy is applied by the next reconcile, which reads this verdict.
    return 0 if adapter.status.pruned_after or await lifecycle.has_policy(ctx, adapter) else None


def _pause(ctx: Context, adapter: Adapter) -> float:
    return ctx.backoff.left(adapter.metadata.uid, adapter.metadata.generation)


def _may_verify(ctx: Context, adapter: Adapter) -> bool:
    """Return whether the pause after the last failed verification is over, or a verification runs already."""
    return verification.running(ctx, adapter) or _pause(ctx, adapter) <= 0


async def _show_verifying(ctx: Context, raw: Manifest, adapter: Adapter, told: dict[str, Any]) -> None:
    """Write the use of a version while its verification waits or runs. An earlier verdict stays until there is another."""
    ready, used_by = find(adapter.status.conditions, "Ready"), told["used_by"]
    if ready is None:
        created = adapter.metadata.creation_timestamp
        if created is not None and seconds_left(created, GATHER) > 0:
            return  # the verdict follows soon, in most cases
        text = "the operator reads the files and compares them with manifest.json"
        ready = condition(KIND, "Ready", "Unknown", "Verifying", text)
        told = told | {"stage": "Verifying"}
    elif ready.observed_generation != adapter.metadata.generation or is_put_away(adapter):
        return  # it is a verdict on another spec, or on files that have been restored meanwhile
    await ctx.write_status(raw, adapter.status.model_copy(update=told), [ready, in_use(used_by)])


async def _refuse(
    ctx: Context, raw: Manifest, adapter: Adapter, outside: InvalidArtifact, used_by: list[str]
) -> float | None:
    """Report a version that the operator must not read.

    Remove the facts that an older operator has read from its files.
    """
    ctx.transfers.forget(adapter.metadata.uid)
    status, verdict = observe(adapter, outside)
    unread = dict.fromkeys(UNREAD) | lifecycle.use(adapter, used_by)
    await ctx.write_status(raw, status.model_copy(update=unread), [verdict, in_use(used_by)])
    return None


def observe(
    adapter: Adapter, checked: AdapterManifest | InvalidArtifact | StoreError
) -> tuple[AdapterStatus, Condition]:
    """Return the status and the condition Ready after a verification (PURE)."""
    before = adapter.status.model_copy(update={"artifact": adapter.artifact})
    if isinstance(checked, StoreError):
        verdict = condition(
            KIND, "Ready", "Unknown", "StorageUnavailable", f"cannot verify the files, the operator retries: {checked}"
        )
        return before.model_copy(update={"stage": "Verifying"}), verdict
    if isinstance(checked, InvalidArtifact):
        return before.model_copy(update={"stage": "Invalid"}), condition(
            KIND, "Ready", "False", checked.reason, str(checked)
        )
    spec = adapter.spec
    told = (spec.adapter, spec.version, spec.base_model, spec.method)
    found = (checked.adapter, checked.version, checked.base_model.name, checked.method)
    if told != found:
        text = (
            f"the manifest is for {' '.join(found)}, but the spec says {' '.join(told)} (adapter, version, baseModel, method). "
            "Create an Adapter that matches the manifest"
        )
        return before.model_copy(update={"stage": "Invalid"}), condition(
            KIND, "Ready", "False", "ManifestMismatch", text
        )
    status = before.model_copy(
        update={
            "stage": "Ready",
            "base_model_digest": checked.base_model.digest or checked.base_model.uri,
            "rank": checked.rank,
            "target_modules": checked.target_modules,
            "stop_token_ids": checked.stop_token_ids or None,
            "prompt_template": checked.prompt_template,
            "size_bytes": checked.served_bytes,
            "metrics": checked.metrics,
            "score": score(checked.metrics),
            "verified_at": now(),
        }
    )
    if checked.rejected:
        text = f"the version missed a gate: {'; '.join(checked.rejected)}. It is kept for comparison and never served"
        return status.model_copy(update={"stage": "Rejected"}), condition(KIND, "Ready", "False", "Rejected", text)
    text = f"{len(checked.files)} files, {checked.size_bytes} bytes, every SHA-256 verified"
    return status, condition(KIND, "Ready", "True", "Verified", text)


def score(metrics: dict[str, float]) -> str | None:
    """Return the main metric as `metric base -> adapter`, for kubectl get (PURE).

    It is the first share that is above 0 for a model. If there is none, the task has many right answers, and only the
    loss shows what training changed.
    """
    shares = ("exactMatch", "toolCallAccuracy")
    telling = [name for name in shares if metrics.get(name) or metrics.get(f"base/{name}")]
    for name in (*telling, "evalLoss", *shares):
        if name in metrics:
            base = metrics.get(f"base/{name}")
            return f"{name} " + (f"{base:.2f} -> {metrics[name]:.2f}" if base is not None else f"{metrics[name]:.2f}")
    return None


def serving(adapter: Adapter, deployments: list[Manifest]) -> list[str]:
    """Return the names of the deployments that serve this version or still unload it (PURE)."""
    name = adapter.metadata.name
    users = []
    for raw in deployments:
        status = raw.get("status", {})
        loaded = {
            item["adapter"]
            for replica in status.get("replicaStatus", [])
            for item in replica.get("adapters", [])
            if item.get("state") not in {"Failed", "Pending"}
        }
        resolved = {item.get("name") for item in status.get("adapters", [])}
        models = status.get("models", [])
        routed = {item.get("adapter") for item in models} | {
            step for item in models for step in item.get("sequence", [])
        }
        if name in loaded | resolved | routed:
            users.append(raw["metadata"]["name"])
    return sorted(users)


def in_use(used_by: list[str]) -> Condition:
    """Return the condition InUse (PURE)."""
    if used_by:
        return condition(
            KIND,
            "InUse",
            "True",
            "Served",
            f"served by {', '.join(used_by)}. A deletion waits until they no longer serve it",
        )
    return condition(KIND, "InUse", "False", "NotServed", "no AdapterDeployment serves it")


async def _clean_up(
    ctx: Context, raw: Manifest, adapter: Adapter, used_by: list[str], deployments: list[Manifest]
) -> float | None:
    if used_by:
        kept = [item for item in adapter.status.conditions if item.type != "InUse"]
        status = adapter.status.model_copy(update={"stage": "Deleting", "used_by": used_by})
        await ctx.write_status(raw, status, [*kept, in_use(used_by)])
        return WAITING
    artifact, prefixes = adapter.artifact, []
    if adapter.spec.artifact is None:
        left = await ending.end_jobs(ctx, adapter)
        if isinstance(left, Trouble):
            unbound = condition(KIND, "Ready", "Unknown", left.reason, left.message)
            await ctx.write_status(raw, adapter.status, [unbound, in_use(used_by)])
            return WAITING
        if left is not None:
            return left
        artifact = artifact or await adapterjob.unseen(ctx, adapter)
        prefixes.append(layout.run_prefix(layout.tenant_of(adapter.metadata.namespace), adapter.metadata.uid))
    own = verification.own_prefix(adapter, artifact, ctx.store.config.bucket)
    if own is not None and lifecycle.removes_files(adapter, deployments):
        prefixes.append(own)
    if (pause := ending.delete(ctx, adapter, prefixes)) is not None:
        return pause
    ctx.folders.forget(adapter.metadata.namespace, adapter.spec.adapter)
    ctx.backoff.forget(adapter.metadata.uid)
    await ctx.remove_finalizer(adapter, KIND)
    return None
