"""Reconcile a version after its verification: record its compatibility and use; keep, compress, restore or delete it.

    Ready -> unused for compressAfter -> copies made and verified -> Archived -> originals deleted
    Archived -> needed, for example by a deployment -> Restoring -> originals restored and verified -> Ready
    unused for unusedFor -> announced (Retained is False, prunedAfter) -> deleted with its files

reconcile/adapter/retention.py decides. Two rules protect a version that another resource has just begun to need:
- Archived is written first. Then everything that could need the version is listed again. A resource that is created
  later sees Archived and waits. A resource that was created earlier is in the list, and the originals stay.
- Before a deletion, everything is listed again, too. Files that an exact reference names by then are not deleted.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from graft.api import Adapter, BaseModel
from graft.api.adapter import CompatibleBase
from graft.api.meta import Condition
from graft.artifacts import archive
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.kube import Manifest
from graft.manifests.adapter import ADAPTER_LABEL
from graft.metrics import LIFECYCLE
from graft.reconcile.adapter import retention, verification
from graft.reconcile.adapter.compatibility import compatible_bases
from graft.reconcile.adapter.facts import adapter_label, version_of
from graft.reconcile.adapter.retention import Plan
from graft.reconcile.shared.access import tenant_of_namespace
from graft.reconcile.shared.context import WAITING, Context
from graft.reconcile.shared.jobs import job_file_of
from graft.reconcile.shared.stored import valid
from graft.status import condition, find, now

KIND = "Adapter"
QUIET = 600.0  # seconds until the next reconcile if nothing is in progress
POLL = 2.0  # seconds until the operator checks running work again
KEEP = Plan("keep")


@dataclass
class Look:
    """One reconcile of one version, with what was read at its beginning."""

    ctx: Context
    raw: Manifest
    adapter: Adapter
    deployments: list[Manifest]
    used_by: list[str]
    in_use: Condition
    versions: list[Adapter] = field(default_factory=list)

    @property
    def uid(self) -> str:
        return self.adapter.metadata.uid

    async def write(self, verdict: Condition, plan: Plan, **changes: Any) -> None:
        """Write the status: the verdict, the use, the compatibility and the plan."""
        told = use(self.adapter, self.used_by) | {
            "compatibility": await compatibility(self.ctx, self.adapter),
            "pruned_after": plan.pruned_after,
        }
        observed = [verdict, self.in_use]
        if plan.reason is not None:
            truth = "False" if plan.reason in {"Expiring", "Pruned"} else "True"
            observed.append(condition(KIND, "Retained", truth, plan.reason, plan.message))  # type: ignore[arg-type]
        await self.ctx.write_status(self.raw, self.adapter.status.model_copy(update=told | changes), observed)


async def compatibility(ctx: Context, adapter: Adapter) -> list[CompatibleBase]:
    """Return the base models that the Adapter fits now."""
    tenant = await tenant_of_namespace(ctx, adapter.metadata.namespace)
    return compatible_bases(adapter, valid(BaseModel, await ctx.cache.list("BaseModel")), tenant)


def use(adapter: Adapter, used_by: list[str]) -> dict[str, Any]:
    """Return the fields of the status about the version's use.

    The time changes when a use begins or ends (PURE except for the clock).
    """
    before = find(adapter.status.conditions, "InUse")
    was = before is not None and before.status == "True"
    changed = was != bool(used_by)
    return {"used_by": used_by, "last_used_time": now() if changed else adapter.status.last_used_time}


async def has_policy(ctx: Context, adapter: Adapter) -> bool:
    """Return whether a version of the adapter has a retention policy. Without one, a version stays as it is."""
    meta = adapter.metadata
    siblings = await ctx.cache.facts(KIND, meta.namespace, adapter.spec.adapter, adapter_label, version_of)
    return any(item.policy for item in siblings)


async def follow(look: Look, verdict: Condition) -> float | None:
    """Keep, compress or delete a version whose verdict is final.

    Return the seconds until the next reconcile, or None.
    """
    plan = await _plan(look) if await has_policy(look.ctx, look.adapter) else KEEP
    if plan.action == "prune":
        await _prune(look, verdict, plan)
        return None
    if plan.action == "archive" and _own_prefix(look.ctx, look.adapter) is not None:
        return await _archive(look, verdict, plan)
    look.ctx.transfers.forget(look.uid)
    await look.write(verdict, plan)
    return plan.next_look


async def attend(look: Look, verdict: Condition) -> float | None:
    """Handle a version that is Archived or Restoring.

    Return the seconds until the next reconcile, or None when its files are restored but not verified yet.
    """
    plan = await _plan(look)
    wanted = retention.users(look.adapter.metadata.name, look.deployments) or retention.is_newest(
        look.adapter, look.versions
    )
    if wanted or verdict.reason == "Restoring" or await _is_awaited(look):
        return await _restore(look, verdict)
    if plan.action == "prune":
        await _prune(look, verdict, plan)
        return QUIET
    transfer, prefix = look.ctx.transfers.find(look.uid), _own_prefix(look.ctx, look.adapter)
    if transfer is not None and not transfer.done:
        return POLL
    if look.ctx.transfers.forget(look.uid) and transfer is not None:
        try:
            transfer.result()
        except StoreError as error:
            text = f"{verdict.message.partition('. ')[0]}. Deleting the uncompressed files failed, the operator retries: {error}"
            await look.write(verdict.model_copy(update={"message": text}), plan)
            return WAITING
        except InvalidArtifact as error:
            return await _broken(look, plan, error) or QUIET
        except archive.Interrupted:
            return POLL
    if prefix is not None and await look.ctx.stored(look.adapter.metadata.namespace, _leftovers, prefix, look.adapter):
        _, needed = await _everything(look)
        if look.adapter.metadata.name in needed:
            return await _restore(look, verdict)
        _start(look, "finish", _finish)
        return POLL
    await look.write(archived_condition(), plan)
    return plan.next_look or QUIET


def archived_condition() -> Condition:
    """Return the condition Ready of a version whose weights are compressed (PURE)."""
    text = "unused, so its weights are compressed in storage. They are restored if an AdapterDeployment refers to the version"
    return condition(KIND, "Ready", "False", "Archived", text)


def removes_files(adapter: Adapter, deployments: list[Manifest]) -> bool:
    """Return whether the files are deleted with the resource: by deletionPolicy, or by the retention policy (PURE).

    If a deployment names the version exactly by now, only the resource is deleted. It can be created again for the same
    files.
    """
    if adapter.spec.deletion_policy == "Delete":
        return True
    retained = find(adapter.status.conditions, "Retained")
    named = f"{adapter.spec.adapter}@{adapter.spec.version}"
    return (
        retained is not None
        and retained.reason == "Pruned"
        and not any(named in retention.texts(item["spec"]) for item in deployments)
    )


async def _plan(look: Look) -> Plan:
    """Decide from the objects that were read.

    Before anything is removed, list everything again and decide once more.
    """
    labels = {ADAPTER_LABEL: look.adapter.spec.adapter}
    found = await look.ctx.cache.list(KIND, look.adapter.metadata.namespace, labels)
    look.versions = valid(Adapter, found)
    needed = retention.needs(look.versions, look.deployments)
    plan = retention.decide(look.adapter, look.versions, needed, time.time())
    if plan.action == "keep":
        return plan
    versions, needed = await _everything(look)
    return retention.decide(look.adapter, versions, needed, time.time())


async def _everything(look: Look) -> tuple[list[Adapter], dict[str, str]]:
    """Return the versions, and why they are needed.

    This includes compositions, BaseModels and the gates of running jobs.
    """
    kube, namespace, name = look.ctx.kube, look.adapter.metadata.namespace, look.adapter.spec.adapter
    deployments = await kube.list("AdapterDeployment", namespace)
    adapters = await kube.list(KIND, namespace)
    compared = set()
    for job in await kube.list("FineTuneJob", namespace):
        if not _compares(job, name):
            continue
        file = job_file_of(await kube.get("ConfigMap", namespace, f"{job['metadata']['name']}-job"))
        if file is not None and file.current is not None:
            compared.add(file.current.digest)
    versions = valid(Adapter, (item for item in adapters if item["spec"]["adapter"] == name))
    models = await kube.list("BaseModel")
    return versions, retention.needs(versions, deployments, retention.composing(adapters), compared, models)


def _compares(job: Manifest, adapter: str) -> bool:
    ended = any(
        item["type"] == "Succeeded" and item["status"] != "Unknown"
        for item in job.get("status", {}).get("conditions", [])
    )
    gates = job["spec"].get("evaluation", {}).get("gates") or []
    return (
        not ended
        and job["spec"]["output"]["adapter"] == adapter
        and any(gate.get("over") == "current" for gate in gates)
    )


async def _is_awaited(look: Look) -> bool:
    """Return whether a composition or a BaseModel needs the version's files."""
    if retention.read_by(look.adapter, await look.ctx.cache.list("BaseModel")):
        return True
    adapters = await look.ctx.cache.list(KIND, look.adapter.metadata.namespace)
    return retention.awaited(look.adapter, look.versions, retention.composing(adapters))


def _own_prefix(ctx: Context, adapter: Adapter) -> str | None:
    return verification.own_prefix(adapter, adapter.artifact, ctx.store.config.bucket)


async def _prune(look: Look, verdict: Condition, plan: Plan) -> None:
    await look.write(verdict, plan)
    await look.ctx.kube.delete(KIND, look.adapter.metadata.namespace, look.adapter.metadata.name, look.uid)
    LIFECYCLE.labels("pruned").inc()


async def _archive(look: Look, verdict: Condition, plan: Plan) -> float | None:
    """Write compressed copies beside the originals while the version is Ready, then Archived.

    `attend` deletes the originals.
    """
    transfer = look.ctx.transfers.find(look.uid)
    if transfer is None or transfer.what != "compress":
        if look.ctx.transfers.forget(look.uid):
            _start(look, "compress", _compress)
        await look.write(verdict, plan)
        return POLL
    if not transfer.done:
        return POLL
    look.ctx.transfers.forget(look.uid)
    try:
        stored = transfer.result()
    except archive.Interrupted:
        return POLL
    except StoreError as error:
        text = f"{plan.message}. Compressing the files failed, the operator retries: {error}"
        await look.write(verdict, replace(plan, message=text))
        return WAITING
    except InvalidArtifact as error:
        return await _broken(look, plan, error)
    await look.write(archived_condition(), plan, stage="Archived", stored_bytes=stored, signature=None)
    LIFECYCLE.labels("archived").inc()
    return 0


async def _restore(look: Look, verdict: Condition) -> float | None:
    transfer = look.ctx.transfers.find(look.uid)
    if transfer is not None and transfer.what == "restore" and transfer.done:
        look.ctx.transfers.forget(look.uid)
        try:
            transfer.result()
        except archive.Interrupted:
            return POLL
        except StoreError as error:
            text = f"restoring the files failed, the operator retries: {error}"
            await look.write(condition(KIND, "Ready", "False", "Restoring", text), KEEP, stage="Restoring")
            return WAITING
        except InvalidArtifact as error:
            return await _broken(look, KEEP, error) or QUIET
        LIFECYCLE.labels("restored").inc()
        return None
    if transfer is None or transfer.what != "restore":
        if not look.ctx.transfers.forget(look.uid):
            return POLL
        _start(look, "restore", _decompress)
    used = {"last_used_time": now()} if verdict.reason == "Archived" else {}
    text = "the version is needed again. The operator decompresses and verifies its weights"
    await look.write(condition(KIND, "Ready", "False", "Restoring", text), KEEP, stage="Restoring", **used)
    return POLL


async def _broken(look: Look, plan: Plan, error: InvalidArtifact) -> float | None:
    verdict = condition(KIND, "Ready", "False", error.reason, str(error))
    await look.write(verdict, plan, stage="Invalid")
    return None


def _start(look: Look, what: str, call: Any) -> None:
    prefix, meta = _own_prefix(look.ctx, look.adapter), look.adapter.metadata
    look.ctx.transfers.start(
        look.uid, what, call, look.ctx.store, prefix, look.adapter,
        namespace=meta.namespace, then=lambda: look.ctx.wake(KIND, meta.namespace, meta.name),
    )  # fmt: skip


def _read(store: S3Store, prefix: str, adapter: Adapter) -> AdapterManifest:
    return read_manifest(store, prefix, adapter.published.digest)[0]


def _compress(store: S3Store, prefix: str, adapter: Adapter, stopped: archive.Stopped) -> int:
    return archive.compress(store, prefix, _read(store, prefix, adapter), stopped)


def _finish(store: S3Store, prefix: str, adapter: Adapter, stopped: archive.Stopped) -> None:
    manifest = _read(store, prefix, adapter)
    archive.compress(store, prefix, manifest, stopped)
    archive.drop_originals(store, prefix, manifest)


def _decompress(store: S3Store, prefix: str, adapter: Adapter, stopped: archive.Stopped) -> None:
    archive.restore(store, prefix, _read(store, prefix, adapter), stopped)


def _leftovers(store: S3Store, prefix: str, adapter: Adapter) -> bool:
    return archive.leftovers(store, prefix, _read(store, prefix, adapter))
