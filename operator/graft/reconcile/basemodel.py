"""Reconcile a BaseModel: check its source, pin its revision or digest, and read its facts."""

import os
from pathlib import Path

from graft.api import BaseModel
from graft.api.basemodel import BaseModelStatus, ModelFacts
from graft.api.meta import Condition
from graft.artifacts import layout, sources
from graft.artifacts.storage import StoreError
from graft.contracts.mounts import HF_TOKEN_FILE
from graft.placement.facts import facts_of
from graft.reconcile.shared import storerights
from graft.reconcile.shared.context import WAITING, Context
from graft.status import condition, find

KIND = "BaseModel"
RECHECK = 600.0  # seconds until a valid source is checked again


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one BaseModel. Return the seconds until the next reconcile, or None if it does not exist."""
    raw = await ctx.cache.get(KIND, None, name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        return None
    model = BaseModel.model_validate(raw)
    found = await _describe(ctx, model)
    status, observed = observe(model, found)
    await ctx.write_status(raw, status, observed)
    ready = find(observed, "Ready")
    return RECHECK if ready is not None and ready.status == "True" else WAITING


async def _describe(ctx: Context, model: BaseModel) -> sources.Description | sources.SourceError | None:
    if model.spec.source.startswith("pvc://"):
        return None
    if (foreign := await _foreign(ctx, model)) is not None:
        return foreign
    try:
        # The rights change before the model is Ready: a pod must not start without the right to read the model, or with
        # a right that is revoked.
        await storerights.allow_models(ctx)
    except StoreError as error:
        return sources.SourceError(f"cannot set the namespaces' rights on the model: {error}", transient=True)
    try:
        token = await ctx.blocking(_token)
        return await ctx.blocking(
            sources.describe, model.spec.source, ctx.store, ctx.settings.huggingface_endpoint, token, pinned(model)
        )
    except sources.SourceError as error:
        return error


async def _foreign(ctx: Context, model: BaseModel) -> sources.SourceError | None:
    """Return why the operator does not read a source with its own key, or None.

    Every user who may list BaseModels sees the facts of a source. So the operator reads a namespace's part of its
    bucket only for a model that only this namespace may use.
    """
    source, bucket = model.spec.source, ctx.store.config.bucket
    if not source.startswith("s3://"):
        return None
    found, key = layout.split_s3_uri(source)
    parts = key.rstrip("/").split("/")
    if {".", ".."} & set(parts) or (found == bucket and "" in parts):
        return sources.SourceError("spec.source has an empty part, . or .. among its folders. Name the folder itself")
    namespace = parts[0]
    shared = found == bucket and f"{namespace}/" == layout.MODELS_PREFIX
    if shared and ctx.identity is not None and storerights.folder_of(source, bucket) is None:
        return sources.SourceError(
            f"spec.source: no key can be given the right to read {source}. Put the model into a folder of its own below "
            f"{layout.s3_uri(bucket, layout.MODELS_PREFIX)}, without the characters * ? $"
        )
    if not layout.in_tenants_part(f"{source.rstrip('/')}/", bucket, layout.tenant_of(namespace)):
        return None
    if model.spec.allowed_namespaces == [namespace] or await ctx.kube.get("Namespace", None, namespace) is None:
        return None
    return sources.SourceError(
        f"spec.source: {source} is in the part of the bucket that belongs to namespace {namespace}. Set "
        f"spec.allowedNamespaces: [{namespace}], or copy the files below {layout.s3_uri(bucket, layout.MODELS_PREFIX)}"
    )


def pinned(model: BaseModel) -> str | None:
    """Return the commit to which spec.source was resolved before, None for a new source (PURE).

    A revision such as main moves. It is resolved once, so that jobs and pods never change to other weights by themselves.
    """
    status, source = model.status, model.spec.source
    if not source.startswith("hf://") or status.revision is None:
        return None
    same = status.source in (None, source)  # None: resolved before the status had this field
    revision = sources.split_hf_uri(source)[1]
    return status.revision if same and revision in {status.revision, *_movable(revision)} else None


def _movable(revision: str) -> set[str]:
    return set() if sources.COMMIT.fullmatch(revision) else {revision}


def _token() -> str | None:
    path = Path(os.environ.get("GRAFT_HF_TOKEN_FILE", HF_TOKEN_FILE))
    return path.read_text().strip() if path.exists() else None


def observe(
    model: BaseModel, found: sources.Description | sources.SourceError | None
) -> tuple[BaseModelStatus, list[Condition]]:
    """Return the status of a base model from what its source contains (PURE)."""
    given = model.spec.facts.wire() if model.spec.facts else {}
    # What was found at another source says nothing about this one.
    same = model.status.source in (None, model.spec.source)
    before = model.status if same else BaseModelStatus(conditions=model.status.conditions)
    if found is None:
        status = BaseModelStatus(
            stage="Ready", source=model.spec.source, facts=model.spec.facts, conditions=before.conditions
        )
        return status, [
            condition(
                KIND,
                "Ready",
                "True",
                "NotInspected",
                f"the operator cannot read {model.spec.source}. Only the pods that mount it check the model",
            )
        ]
    if isinstance(found, sources.SourceError):
        ready = find(before.conditions, "Ready")
        current = ready is not None and ready.observed_generation == model.metadata.generation
        if found.transient and current and ready is not None and ready.status == "True":
            # The source does not answer now, but it was valid before and is pinned. So the BaseModel stays Ready.
            return before, [ready]
        reason = "SourceUnavailable" if found.transient else "SourceInvalid"
        return before.model_copy(update={"stage": "Unavailable"}), [
            condition(KIND, "Ready", "False", reason, str(found))
        ]
    facts = ModelFacts.model_validate(facts_of(found.config, found.license, found.size_bytes).wire() | given)
    # What was found is reported in any case. So the status does not depend on what the spec was before.
    status = before.model_copy(
        update={
            "stage": "Ready",
            "revision": found.revision,
            "source": model.spec.source,
            "digest": found.digest,
            "size_bytes": found.size_bytes,
            "facts": facts,
        }
    )
    if facts.task is not None and facts.task != model.spec.task:
        text = (
            f"spec.task is {model.spec.task}, but config.json describes a {facts.task} model"
            f"{f' ({facts.architecture})' if facts.architecture else ''}. Set spec.task: {facts.task}"
        )
        return status.model_copy(update={"stage": "Unavailable"}), [
            condition(KIND, "Ready", "False", "SourceInvalid", text)
        ]
    identity = found.revision or found.digest or ""
    what = f"{model.spec.source} resolves to {identity}"
    if found.latest is not None and found.latest != found.revision:
        repo, moved = sources.split_hf_uri(model.spec.source)
        now = f"refers to {found.latest} now" if found.latest else "does not exist any more"
        follow = f"To change to it, set spec.source: hf://{repo}@{found.latest}. " if found.latest else ""
        text = f"{moved} {now}. Jobs and deployments stay on {identity}, to which it was first resolved. {follow}"
        return status, [condition(KIND, "Ready", "True", "SourceChanged", text.strip())]
    changed = before.digest is not None and found.digest != before.digest and found.revision is None
    reason = "SourceChanged" if changed else "Resolved"
    ready = find(before.conditions, "Ready")
    if (
        found.revision is None
        and same
        and not changed
        and ready is not None
        and ready.reason == "SourceChanged"
        and before.digest == found.digest
    ):
        reason = "SourceChanged"
    text = f"{what}. Its files have changed since it was first resolved. New jobs and pods use the new files"
    return status, [condition(KIND, "Ready", "True", reason, text if reason == "SourceChanged" else what)]
