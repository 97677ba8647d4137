"""What a job and a deployment both need before anything is made: the base model, and the namespace's key of the store."""

from dataclasses import dataclass

from graft.api import BaseModel
from graft.artifacts.layout import tenant_of
from graft.artifacts.storage import StorageConfig, StoreError
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError
from graft.manifests.adapter import storage_secret
from graft.reconcile.shared.context import Context
from graft.status import find

SECRET_KEYS = {"endpoint", "region", "bucket", "prefix", "access-key-id", "secret-access-key"}


@dataclass(frozen=True)
class Trouble:
    """Why nothing can be made yet: a reason of the condition Accepted, and what to do."""

    reason: str
    message: str


@dataclass(frozen=True)
class Base:
    """A base model that may be used now: pinned, with its facts."""

    ref: BaseModelRef
    model: BaseModel


def base_model_of(name: str, namespace: str, model: BaseModel | None) -> Base | Trouble:
    """The base model, pinned to its commit or digest (PURE)."""
    if model is None:
        return Trouble("BaseModelMissing", f"BaseModel {name} does not exist; this goes on when it is there")
    allowed = model.spec.allowed_namespaces
    if allowed is not None and namespace not in allowed:
        return Trouble(
            "BaseModelForbidden",
            f"BaseModel {name} may not be used from namespace {namespace}; ask for it in its spec.allowedNamespaces",
        )
    ready = find(model.status.conditions, "Ready")
    stale = ready is not None and ready.observed_generation != model.metadata.generation
    if ready is None or ready.status != "True" or stale:
        why = ready.message if ready is not None else "it was not looked at yet"
        return Trouble("BaseModelNotReady", f"BaseModel {name} is not Ready: {why}")
    uri = model.spec.source
    if model.status.revision:
        uri = f"{uri.partition('@')[0]}@{model.status.revision}"
    return Base(BaseModelRef(name=name, uri=uri, digest=model.status.digest, version=model.spec.version), model)


async def gather_base_model(ctx: Context, name: str, namespace: str) -> Base | Trouble:
    """Look the base model up."""
    raw = await ctx.kube.get("BaseModel", None, name)
    return base_model_of(name, namespace, BaseModel.model_validate(raw) if raw else None)


async def ensure_credentials(ctx: Context, namespace: str) -> Trouble | None:
    """The namespace's Secret graft-storage: there, or issued now. Trouble says what is missing."""
    try:
        keys, ours = await _credentials(ctx, namespace)
        if ctx.identity is None or not ours:
            return _incomplete(namespace, keys)
        tenant = tenant_of(namespace)
        if keys >= SECRET_KEYS and tenant in ctx.issued:
            return None
        async with ctx.locks["credentials",]:  # one at a time changes the store's users
            keys, ours = await _credentials(ctx, namespace)  # the look that was here before may have issued it
            if not ours:
                return _incomplete(namespace, keys)
            known = tenant in ctx.issued or tenant in await ctx.blocking(ctx.identity.tenants)
            if not (known and keys >= SECRET_KEYS):
                config = await ctx.blocking(ctx.identity.issue, tenant)
                await ctx.kube.apply(storage_secret(namespace, _for_pods(ctx, config)))
            ctx.issued.add(tenant)
    except StoreError as error:
        return Trouble("StorageUnavailable", f"no key could be issued: {error}")
    except KubeError as error:
        if error.status == 403:
            return Trouble("NamespaceNotBound", not_bound(ctx, namespace))
        raise
    return None


async def _credentials(ctx: Context, namespace: str) -> tuple[set[str], bool]:
    """The keys of the namespace's Secret, and whether it is ours to make."""
    secret = await ctx.kube.get("Secret", namespace, STORAGE_SECRET)
    if secret is None:
        return set(), True
    ours = secret["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "graft"
    return set(secret.get("data") or {}), ours


def _incomplete(namespace: str, keys: set[str]) -> Trouble | None:
    """What a Secret that somebody else makes lacks (PURE)."""
    missing = ", ".join(sorted(SECRET_KEYS - keys))
    if not missing:
        return None
    return Trouble(
        "CredentialsMissing",
        f"put a Secret {STORAGE_SECRET} into namespace {namespace}, with a key that is limited to the prefix "
        f"{tenant_of(namespace)}/; missing in it: {missing}",
    )


def _for_pods(ctx: Context, config: StorageConfig) -> StorageConfig:
    endpoint = ctx.settings.storage.endpoint or config.endpoint
    return StorageConfig(**(config.__dict__ | {"endpoint": endpoint}))


def not_bound(ctx: Context, namespace: str) -> str:
    """What to do about a namespace in which the operator has no rights."""
    settings = ctx.settings
    return (
        f"the operator may not write in namespace {namespace}; bind it: kubectl create rolebinding graft -n {namespace} "
        f"--clusterrole={settings.tenant_cluster_role} --serviceaccount={settings.namespace}:{settings.operator_service_account}"
    )


async def revoke_orphans(ctx: Context) -> None:
    """Take away the keys of namespaces that are gone."""
    if ctx.identity is None:
        return
    async with ctx.locks["credentials",]:
        tenants = await ctx.blocking(ctx.identity.tenants)
        namespaces = {tenant_of(item["metadata"]["name"]) for item in await ctx.kube.list("Namespace")}
        for tenant in sorted(tenants - namespaces):
            await ctx.blocking(ctx.identity.revoke, tenant)
            ctx.issued.discard(tenant)
