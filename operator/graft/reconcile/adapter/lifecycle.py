"""A version after its verification: what it fits, who uses it, and whether it stays, is compressed or is deleted.

    Ready -> unused for compressAfter -> copies made and verified -> Archived -> originals deleted
    Archived -> named by a deployment -> Restoring -> originals made and verified -> Ready
    unused for unusedFor -> announced (Retained is False, prunedAfter) -> deleted with its files

reconcile/adapter/retention.py decides. Two orders keep a version from being taken away under somebody who has just come to want it:
- Archived is written first, and then everything that could want the version is listed anew. Who comes later sees Archived and waits;
  who came before is in that list, and the originals stay.
- before a deletion everything is listed anew as well, and files that an exact reference names by then are left where they are.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from graft.api import Adapter, BaseModel
from graft.api.meta import Condition
from graft.artifacts import archive, layout
from graft.artifacts.manifest import Manifest as AdapterManifest
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts.job import JobFile
from graft.kube import Manifest
from graft.manifests.adapter import ADAPTER_LABEL
from graft.metrics import LIFECYCLE
from graft.reconcile.adapter import retention
from graft.reconcile.adapter.compatibility import compatible_bases
from graft.reconcile.adapter.retention import Plan
from graft.reconcile.shared.context import WAITING, Context
from graft.status import condition, find, now

KIND = "Adapter"
QUIET = 600.0
POLL = 2.0  # seconds until a look at work that goes on
KEEP = Plan("keep")


@dataclass
class Look:
    """One look at one version: what was read at its beginning."""

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
        """The status: verdict, use, compatibility and the plan."""
        models = [BaseModel.model_validate(item) for item in await self.ctx.kube.list("BaseModel")]
        told = use(self.adapter, self.used_by) | {
            "compatibility": compatible_bases(self.adapter, models),
            "pruned_after": plan.pruned_after,
        }
        observed = [verdict, self.in_use]
        if plan.reason is not None:
            truth = "False" if plan.reason in {"Expiring", "Pruned"} else "True"
            observed.append(condition(KIND, "Retained", truth, plan.reason, plan.message))  # type: ignore[arg-type]
        await self.ctx.write_status(self.raw, self.adapter.status.model_copy(update=told | changes), observed)


def use(adapter: Adapter, used_by: list[str]) -> dict[str, Any]:
    """The status' part about its use; the time is written when a use begins or ends (PURE but for the clock)."""
    before = find(adapter.status.conditions, "InUse")
    was = before is not None and before.status == "True"
    changed = was != bool(used_by)
    return {"used_by": used_by, "last_used_time": now() if changed else adapter.status.last_used_time}


async def label(ctx: Context, adapter: Adapter) -> bool:
    """Versions are found by a label; True when one that was made by hand had to be given it."""
    if adapter.metadata.labels.get(ADAPTER_LABEL) == adapter.spec.adapter:
        return False
    patch = {"metadata": {"uid": adapter.metadata.uid, "labels": {ADAPTER_LABEL: adapter.spec.adapter}}}
    await ctx.kube.merge_patch(KIND, adapter.metadata.namespace, adapter.metadata.name, patch)
    return True


async def follow(look: Look, verdict: Condition) -> float | None:
    """A version whose verdict stands: keep it, compress it or delete it; the seconds until the next look."""
    plan = await _plan(look)
    if plan.action == "prune":
        await _prune(look, verdict, plan)
        return None
    if plan.action == "archive" and _own_prefix(look.ctx, look.adapter) is not None:
        return await _archive(look, verdict, plan)
    look.ctx.transfers.forget(look.uid)
    await look.write(verdict, plan)
    return plan.next_look


async def attend(look: Look, verdict: Condition) -> float | None:
    """A version that is Archived or Restoring: the seconds until the next look, or None once its files are back, unverified."""
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
            text = f"{verdict.message.partition(';')[0]}; its originals are deleted later: {error}"
            await look.write(verdict.model_copy(update={"message": text}), plan)
            return WAITING
        except InvalidArtifact as error:
            return await _broken(look, plan, error) or QUIET
        except archive.Interrupted:
            return POLL
    if prefix is not None and await look.ctx.blocking(_leftovers, look.ctx.store, prefix, look.adapter):
        _, needed = await _everything(look)
        if look.adapter.metadata.name in needed:
            return await _restore(look, verdict)
        _start(look, "finish", _finish)
        return POLL
    await look.write(archived_condition(), plan)
    return plan.next_look or QUIET


async def archived(ctx: Context, adapter: Adapter, error: object) -> AdapterManifest | None:
    """The manifest of a version of which files are missing, if they are there in compressed form: its status was lost."""
    prefix = _own_prefix(ctx, adapter)
    if prefix is None or not isinstance(error, InvalidArtifact) or error.reason != "FileMissing":
        return None
    manifest, _ = await ctx.blocking(read_manifest, ctx.store, prefix, adapter.published.digest)
    return manifest if await ctx.blocking(archive.is_archived, ctx.store, prefix, manifest) else None


def archived_condition() -> Condition:
    """Ready of a version whose weights are compressed (PURE)."""
    text = "unused: its weights are compressed in storage; name it in an AdapterDeployment and they are restored"
    return condition(KIND, "Ready", "False", "Archived", text)


def removes_files(adapter: Adapter, deployments: list[Manifest]) -> bool:
    """Whether the files go with the resource: as its deletionPolicy says, or because the retention policy deleted it (PURE).

    A version that somebody has come to name exactly since then loses the resource only; made anew by hand it is there again.
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
    """Decided on what is at hand; before anything is taken away, on everything, listed anew."""
    labels = {ADAPTER_LABEL: look.adapter.spec.adapter}
    found = await look.ctx.kube.list(KIND, look.adapter.metadata.namespace, labels)
    look.versions = [Adapter.model_validate(item) for item in found]
    needed = retention.needs(look.versions, look.deployments)
    plan = retention.decide(look.adapter, look.versions, needed, time.time())
    if plan.action == "keep":
        return plan
    versions, needed = await _everything(look)
    return retention.decide(look.adapter, versions, needed, time.time())


async def _everything(look: Look) -> tuple[list[Adapter], dict[str, str]]:
    """The versions, and why they are needed: with compositions, BaseModels and the gates of running jobs."""
    kube, namespace, name = look.ctx.kube, look.adapter.metadata.namespace, look.adapter.spec.adapter
    deployments = await kube.list("AdapterDeployment", namespace)
    adapters = await kube.list(KIND, namespace)
    compared = set()
    for job in await kube.list("FineTuneJob", namespace):
        if not _compares(job, name):
            continue
        stored = await kube.get("ConfigMap", namespace, f"{job['metadata']['name']}-job")
        file = JobFile.model_validate_json(stored["data"]["job.json"]) if stored else None
        if file is not None and file.current is not None:
            compared.add(file.current.digest)
    versions = [Adapter.model_validate(item) for item in adapters if item["spec"]["adapter"] == name]
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
    """Whether a composition or a BaseModel takes its files."""
    if retention.read_by(look.adapter, await look.ctx.kube.list("BaseModel")):
        return True
    adapters = await look.ctx.kube.list(KIND, look.adapter.metadata.namespace)
    return retention.awaited(look.adapter, look.versions, retention.composing(adapters))


def _own_prefix(ctx: Context, adapter: Adapter) -> str | None:
    """Where the files are, if that is a place of this adapter in our bucket: nothing else is ever written or deleted."""
    bucket, prefix = layout.split_s3_uri(adapter.published.uri)
    own = layout.adapter_versions_prefix(layout.tenant_of(adapter.metadata.namespace), adapter.spec.adapter)
    return prefix if bucket == ctx.store.config.bucket and prefix.startswith(own) else None


async def _prune(look: Look, verdict: Condition, plan: Plan) -> None:
    await look.write(verdict, plan)
    await look.ctx.kube.delete(KIND, look.adapter.metadata.namespace, look.adapter.metadata.name, look.uid)
    LIFECYCLE.labels("pruned").inc()


async def _archive(look: Look, verdict: Condition, plan: Plan) -> float | None:
    """Copies first, beside the originals and while the version is Ready; then the verdict. `attend` deletes the originals."""
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
        text = f"{plan.message}; compressing it failed and is tried again: {error}"
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
            text = f"its files are not restored yet, this is tried again: {error}"
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
    text = "wanted again: its weights are decompressed and verified"
    await look.write(condition(KIND, "Ready", "False", "Restoring", text), KEEP, stage="Restoring", **used)
    return POLL


async def _broken(look: Look, plan: Plan, error: InvalidArtifact) -> float | None:
    verdict = condition(KIND, "Ready", "False", error.reason, str(error))
    await look.write(verdict, plan, stage="Invalid")
    return None


def _start(look: Look, what: str, call: Any) -> None:
    prefix = _own_prefix(look.ctx, look.adapter)
    look.ctx.transfers.start(look.uid, what, call, look.ctx.store, prefix, look.adapter)


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
