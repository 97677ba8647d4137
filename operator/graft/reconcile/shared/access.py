"""Provide the base model and the namespace's storage key, which every kind needs before its children are created.

It does not know any kind's life cycle.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from graft.api import BaseModel
from graft.artifacts.layout import USER_PREFIX, tenant_of, why_reserved
from graft.artifacts.storage import StorageConfig, StoreError
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError
from graft.manifests.adapter import storage_secret
from graft.reconcile.shared.context import Context
from graft.status import find

Entries = tuple[set[str], bool]  # names of the entries of a Secret, and whether the operator may replace it
KEY = {"access-key-id", "secret-access-key"}
SECRET_KEYS = {"endpoint", "region", "bucket", "prefix"} | KEY
ROLE_KEYS = SECRET_KEYS - KEY | {"role-arn"}  # with objectStore.credentials: webIdentity


@dataclass(frozen=True)
class Trouble:
    """Why nothing can be created yet: a reason of the condition Accepted (Adapter: Ready), and what to do."""

    reason: str
    message: str


@dataclass(frozen=True)
class Base:
    """A base model that may be used now: its pinned reference, and the BaseModel with its facts."""

    ref: BaseModelRef
    model: BaseModel


def base_model_of(name: str, namespace: str, model: BaseModel | None) -> Base | Trouble:
    """Return the base model, pinned to its commit or digest, or why the namespace cannot use it now (PURE)."""
    if model is None:
        return Trouble(
            "BaseModelMissing",
            f"BaseModel {name} (spec.baseModel) does not exist. Create it, and the operator continues",
        )
    allowed = model.spec.allowed_namespaces
    if allowed is not None and namespace not in allowed:
        return Trouble(
            "BaseModelForbidden",
            f"namespace {namespace} may not use BaseModel {name}. Ask your platform team to add the namespace to "
            f"spec.allowedNamespaces of the BaseModel",
        )
    ready = find(model.status.conditions, "Ready")
    if ready is None or ready.observed_generation != model.metadata.generation:
        return Trouble("BaseModelNotReady", f"the operator has not checked the present spec of BaseModel {name} yet")
    if ready.status != "True":
        return Trouble("BaseModelNotReady", f"BaseModel {name} is not Ready: {ready.message}")
    uri = model.spec.source
    if model.status.revision:
        uri = f"{uri.partition('@')[0]}@{model.status.revision}"
    facts = model.status.facts
    ref = BaseModelRef(
        name=name,
        uri=uri,
        digest=model.status.digest,
        version=model.spec.version,
        license=facts.license if facts is not None else None,
    )
    return Base(ref, model)


async def gather_base_model(ctx: Context, name: str, namespace: str) -> Base | Trouble:
    """Read the BaseModel. Return it pinned, or why the namespace cannot use it now."""
    raw = await ctx.cache.get("BaseModel", None, name)
    try:
        model = BaseModel.model_validate(raw) if raw else None
    except ValidationError:
        return Trouble("BaseModelNotReady", f"the schema of Graft refuses BaseModel {name}. See its condition Ready")
    return base_model_of(name, namespace, model)


def reserved(namespace: str, why: str) -> Trouble:
    """Return why the resources of a namespace are refused, and what to do (PURE)."""
    return Trouble(
        "NamespaceReserved",
        f"namespace {namespace} cannot use Graft: {why}. Create the resource in a namespace with another name. "
        f"docs/operations.md#reserved-namespaces says how to move what exists",
    )


async def ensure_credentials(ctx: Context, namespace: str, entries: Entries | None = None) -> Trouble | None:
    """Make sure that the namespace has a complete Secret graft-storage, and issue a key if needed.

    `entries`: what `read_secret` returned a moment ago. Return what is missing, or None.
    """
    if (why := why_reserved(namespace)) is not None:
        return reserved(namespace, why)
    try:
        keys, ours = entries or await read_secret(ctx, namespace)
        if ctx.identity is None or not ours:
            return _incomplete(ctx, namespace, keys)
        tenant = tenant_of(namespace)
        if keys >= SECRET_KEYS and tenant in ctx.issued:
            return None
        async with ctx.locks.hold("credentials"):  # only one reconcile at a time changes the users of the store
            keys, ours = await read_secret(ctx, namespace)  # another reconcile may have issued the key meanwhile
            if not ours:
                return _incomplete(ctx, namespace, keys)
            known = tenant in ctx.issued or tenant in await ctx.store_calls.run("", ctx.identity.tenants)
            if not (known and keys >= SECRET_KEYS):
                config = await ctx.store_calls.run("", ctx.identity.issue, tenant)
                await ctx.kube.apply(storage_secret(namespace, _for_pods(ctx, config)))
            ctx.issued.add(tenant)
    except StoreError as error:
        return Trouble(
            "StorageUnavailable", f"cannot issue a storage key for namespace {namespace}, the operator retries: {error}"
        )
    except KubeError as error:
        if error.status == 403:
            return Trouble("NamespaceNotBound", not_bound(ctx, namespace))
        raise
    return None


async def peek(ctx: Context, namespace: str) -> Entries | None:
    """Return what `ensure_credentials` is going to need of the Secret. None after an error, which it then reports."""
    try:
        return await read_secret(ctx, namespace)
    except KubeError:
        return None


async def read_secret(ctx: Context, namespace: str) -> Entries:
    """Return the names of the entries of the Secret graft-storage, and whether the operator may create or replace the Secret."""
    secret = await ctx.kube.get("Secret", namespace, STORAGE_SECRET)
    if secret is None:
        return set(), True
    ours = secret["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "graft"
    return set(secret.get("data") or {}), ours


def _incomplete(ctx: Context, namespace: str, keys: set[str]) -> Trouble | None:
    """Return what is missing in a Secret that the operator does not manage, or None if it is complete (PURE)."""
    roles = bool(ctx.settings.storage.web_identity_audience)
    missing = ", ".join(sorted((ROLE_KEYS if roles and not keys >= KEY else SECRET_KEYS) - keys))
    if not missing:
        return None
    what = "the ARN of a role" if roles else "a storage key"
    return Trouble(
        "CredentialsMissing",
        f"Secret {STORAGE_SECRET} in namespace {namespace} is missing or incomplete. Create it with {what} that is "
        f"limited to the prefix {tenant_of(namespace)}/. Missing entries: {missing}",
    )


def _for_pods(ctx: Context, config: StorageConfig) -> StorageConfig:
    endpoint = ctx.settings.storage.endpoint or config.endpoint
    return StorageConfig(**(config.__dict__ | {"endpoint": endpoint}))


def not_bound(ctx: Context, namespace: str) -> str:
    """Return the message for a namespace in which the operator has no rights: it says how to bind the namespace."""
    settings = ctx.settings
    return (
        f"the operator may not write in namespace {namespace}. Ask an administrator to bind it: kubectl create rolebinding graft -n {namespace} "
        f"--clusterrole={settings.tenant_cluster_role} --serviceaccount={settings.namespace}:{settings.operator_service_account}"
    )


async def revoke_orphans(ctx: Context) -> None:
    """Revoke the storage keys of namespaces that no longer exist."""
    if ctx.identity is None:
        return
    async with ctx.locks.hold("credentials"):
        tenants = await ctx.store_calls.run("", ctx.identity.tenants)
        found = await ctx.kube.list("Namespace", metadata_only=True)
        # A reserved namespace cannot be a tenant, so the key that an earlier version of Graft gave it is revoked.
        namespaces = {tenant_of(name) for item in found if why_reserved(name := item["metadata"]["name"]) is None}
        own = {ctx.store.config.access_key_id.removeprefix(USER_PREFIX)}
        for tenant in sorted(tenants - namespaces - own):
            await ctx.store_calls.run("", ctx.identity.revoke, tenant)
            ctx.issued.discard(tenant)
