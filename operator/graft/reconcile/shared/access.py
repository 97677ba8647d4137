"""Provide the base model and the namespace's storage key, which every kind needs before its children are created.

It does not know any kind's life cycle.
"""

import asyncio
import base64
import re
from dataclasses import dataclass
from functools import partial

from pydantic import ValidationError

from graft.api import BaseModel
from graft.artifacts import inheritance
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.layout import USER_PREFIX, tenant_of, why_reserved
from graft.artifacts.storage import StorageConfig, StoreError
from graft.contracts.message import BaseModelRef
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError
from graft.manifests.adapter import storage_secret
from graft.manifests.metadata import Manifest
from graft.reconcile.claims import Claim, claim_of, holder
from graft.reconcile.shared import storerights
from graft.reconcile.shared.context import Context
from graft.status import find

KEY = {"access-key-id", "secret-access-key"}
SECRET_KEYS = {"endpoint", "region", "bucket", "prefix"} | KEY
ROLE_KEYS = SECRET_KEYS - KEY | {"role-arn"}  # with objectStore.credentials: webIdentity
# All entries that pods read (StorageConfig.from_dir). Others in an issued Secret do no harm, and stay.
READ = SECRET_KEYS | ROLE_KEYS | {"session-token", "sts-endpoint", "ca.crt"}


# In the message of a 403: the operator lacks the right itself, or the right to give it to an agent. Any other 403 comes
# from an admission plugin, such as a ResourceQuota.
# https://github.com/kubernetes/apiserver/blob/master/pkg/endpoints/handlers/responsewriters/errors.go
RIGHTS = re.compile(r'User "[^"]*" cannot |attempting to grant RBAC permissions')
# The namespace or the kind does not exist, or the API server cannot answer now.
PASSING = frozenset({401, 404, 408, 410, 429})


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


async def tenant_of_namespace(ctx: Context, namespace: str) -> Claim | None:
    """Return the Tenant that has a namespace, or None. While Tenants have no effect, no namespace has one."""
    if not ctx.settings.tenants_enabled or not (claims := await ctx.cache.every("Tenant", claim_of)):
        return None
    metadata = await ctx.cache.metadata("Namespace", None, namespace)
    return holder(claims, namespace, (metadata or {}).get("labels") or {}, ctx.settings.namespace)


def base_model_of(name: str, namespace: str, model: BaseModel | None, tenant: Claim | None) -> Base | Trouble:
    """Return the base model, pinned to its commit or digest, or why the namespace cannot use it now (PURE).

    `tenant`: the Tenant that has the namespace, if there is one.
    """
    if tenant is not None and not tenant.lets_use(name):
        # First, so that a team does not learn which other base models exist.
        return Trouble(
            "BaseModelForbidden",
            f"Tenant {tenant.tenant}, to which namespace {namespace} belongs, may not use BaseModel {name}. Ask your platform "
            f"team to add it to spec.baseModels of the Tenant",
        )
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
    return base_model_of(name, namespace, model, await tenant_of_namespace(ctx, namespace))


def reserved(namespace: str, why: str) -> Trouble:
    """Return why the resources of a namespace are refused, and what to do (PURE)."""
    return Trouble(
        "NamespaceReserved",
        f"namespace {namespace} cannot use Graft: {why}. Create the resource in a namespace with another name. "
        f"docs/operations.md#reserved-namespaces says how to move what exists",
    )


async def ensure_credentials(ctx: Context, namespace: str, *, changed: bool = False) -> Trouble | None:
    """Make sure that the namespace has a complete Secret graft-storage, and that its key works. Issue a key if needed.

    Return what is missing, or None. `changed`: the Secret has changed just now, so a read that is under way is too old.
    """
    if (why := why_reserved(namespace)) is not None:
        return reserved(namespace, why)
    try:
        found = await (_secret if changed else _read_once)(ctx, namespace)
        keys, ours = _entries(found)
        if ctx.identity is None or not ours:
            return _incomplete(ctx, namespace, keys)
        if _is_right(ctx, namespace, found):
            return None
        async with ctx.locks.hold("credentials"):  # only one reconcile at a time changes the users of the store
            secret = await _secret(ctx, namespace)  # another reconcile may have issued the key meanwhile
            keys, ours = _entries(secret)
            if not ours:
                return _incomplete(ctx, namespace, keys)
            if not _is_right(ctx, namespace, secret):
                issued = await _issue(ctx, ctx.identity, namespace, secret)
                if isinstance(issued, Trouble):
                    ctx.issued.pop(namespace, None)
                    return issued
                ctx.issued[namespace] = issued
    except StoreError as error:
        return Trouble(
            "StorageUnavailable", f"cannot issue a storage key for namespace {namespace}, the operator retries: {error}"
        )
    except KubeError as error:
        if error.status == 409:
            raise  # another writer was first: what it has written is read again
        if (refused := refusal_of(ctx, namespace, f"Secret {STORAGE_SECRET}", error)) is None:
            raise
        return refused
    return None


def _is_right(ctx: Context, namespace: str, secret: Manifest | None) -> bool:
    """Return whether this version of the Secret is known to be right."""
    return secret is not None and secret["metadata"]["resourceVersion"] == ctx.issued.get(namespace)


async def _issue(ctx: Context, identity: VersityIdentity, namespace: str, secret: Manifest | None) -> str | Trouble:
    """Make sure that the Secret has a key and that the store accepts it. Return the version of the Secret that is right, or
    why there is no key.

    The Secret comes first, over the state that was read, and the store accepts the key that the Secret has. So of two
    operators, and of an operator that was killed and its successor, both accept the same key.
    """
    tenant = tenant_of(namespace)
    user, key = _key(secret)
    works = key is not None and await ctx.store_calls.run("", identity.works, tenant, user, key)
    known = works or await ctx.store_calls.run("", identity.has_key, tenant)
    if (team := await tenant_of_namespace(ctx, namespace)) is not None:
        # A namespace with the key that works is the one that has used it. It has become a Tenant's, or was restored.
        inherit = namespace in team.inherits or works
        if (refused := await _take(ctx, team, namespace, inherit=inherit)) is not None:
            if known:  # a key of the earlier namespace
                await ctx.store_calls.run("", identity.revoke, tenant)
            return refused
        # The rights on base models come before the key: its Tenant may not use all of them.
        await storerights.allow_models(ctx)
    if key is None or (not works and (known or user != identity.user(tenant))):
        if known:  # the Secret was deleted or damaged: the key that it had must not work any more
            await ctx.store_calls.run("", identity.revoke, tenant)
        drawn = await ctx.store_calls.run("", identity.draw, tenant)
        user, key, known = drawn.access_key_id, drawn.secret_access_key, False
    version = await _keep(ctx, namespace, identity.key(tenant, user, key), secret)
    if not known:
        await ctx.store_calls.run("", identity.accept, tenant, key)
    return version


async def record_part(ctx: Context, team: str, namespace: str, uid: str, *, inherit: bool) -> Trouble | None:
    """Record that a namespace of a Tenant has its part of the bucket, if it has a key already: it may have joined the
    Tenant later. Without a key, return why it would get none, or None.

    `inherit`: it takes over the files of an earlier namespace. Raises KubeError and StoreError.
    """
    if ctx.identity is None or uid in ctx.recorded:
        return None
    tenant = tenant_of(namespace)
    async with ctx.locks.hold("credentials"):
        user, key = _key(await _secret(ctx, namespace))
        if key is not None and await ctx.store_calls.run("", ctx.identity.works, tenant, user, key):
            await ctx.stored("", partial(inheritance.take, inherit=True), tenant, uid)
            ctx.recorded.add(uid)
            return None
    if inherit or await ctx.stored("", inheritance.is_free, tenant, uid):
        return None
    return _taken(team, namespace)


def _taken(team: str, namespace: str) -> Trouble:
    return Trouble(
        "PrefixTaken",
        f"the bucket has files below {tenant_of(namespace)}/ that an earlier namespace of this name has left. Ask your platform "
        f"team to delete them, or to list {namespace} in spec.namespaces.inherit of Tenant {team}",
    )


async def _take(ctx: Context, team: Claim, namespace: str, *, inherit: bool) -> Trouble | None:
    """Take the namespace's part of the bucket for the namespace as it is now. Return why that is not possible, or None."""
    found = await ctx.kube.get("Namespace", None, namespace)  # not from the cache: it may have been made anew
    if found is None:
        raise KubeError(404, "NotFound", f"namespace {namespace} does not exist")
    take = partial(inheritance.take, inherit=inherit)
    taken = await ctx.stored("", take, tenant_of(namespace), found["metadata"]["uid"])
    return None if taken else _taken(team.tenant, namespace)


async def _read_once(ctx: Context, namespace: str) -> Manifest | None:
    """Return the Secret. Many jobs of a namespace may start at once: they share a read that is under way."""
    reading = ctx.reading.get(namespace)
    if reading is None:
        reading = ctx.reading[namespace] = asyncio.ensure_future(_secret(ctx, namespace))
        reading.add_done_callback(lambda _: ctx.reading.pop(namespace, None))
    return await asyncio.shield(reading)


async def _secret(ctx: Context, namespace: str) -> Manifest | None:
    return await ctx.kube.get("Secret", namespace, STORAGE_SECRET)


def _entries(secret: Manifest | None) -> tuple[set[str], bool]:
    """Return the names of the entries of a Secret, and whether the operator may create or replace it (PURE)."""
    if secret is None:
        return set(), True
    ours = secret["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "graft"
    return set(secret.get("data") or {}), ours


def _key(secret: Manifest | None) -> tuple[str, str | None]:
    """Return the user and the secret key of a Secret graft-storage. None as the key if it has no usable one (PURE)."""
    data = (secret or {}).get("data") or {}
    try:
        user, key = (base64.b64decode(data[entry], validate=True).decode() for entry in sorted(KEY))
    except (ValueError, KeyError):
        return "", None
    return user, key if 16 <= len(key) <= 128 and key.isprintable() else None


async def _keep(ctx: Context, namespace: str, key: StorageConfig, secret: Manifest | None) -> str:
    """Let the Secret graft-storage have this key, over the state that was read. Return its version then.

    Nothing is written if it has it already. Raises KubeError with status 409 if another operator has written it
    meanwhile: its key counts.
    """
    manifest = storage_secret(namespace, _for_pods(ctx, key))
    if secret is None:
        return str((await ctx.kube.create(manifest))["metadata"]["resourceVersion"])
    metadata, data = secret["metadata"], secret.get("data") or {}
    version = str(metadata["resourceVersion"])
    wanted = {entry: manifest["data"].get(entry) for entry in READ}
    if all(data.get(entry) == value for entry, value in wanted.items()):
        return version
    patch = {"metadata": {"uid": metadata["uid"], "resourceVersion": version}, "data": wanted}
    written = await ctx.kube.merge_patch("Secret", namespace, STORAGE_SECRET, patch)
    if written is None:
        raise KubeError(409, "Conflict", f"Secret {STORAGE_SECRET} in namespace {namespace} was deleted meanwhile")
    return str(written["metadata"]["resourceVersion"])


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


def refusal_of(ctx: Context, namespace: str, what: str, error: KubeError) -> Trouble | None:
    """Return why the API server refuses to create or change a child, or None if it only cannot do so now (PURE).

    `what`: the child. Admission webhooks refuse with 400 unless they choose another status, policies with 422, quotas
    with 403.
    """
    if error.status == 403 and RIGHTS.search(str(error)):
        return Trouble("NamespaceNotBound", f"{not_bound(ctx, namespace)} ({error})")
    if 400 <= error.status < 500 and error.status not in PASSING:
        return Trouble("CreationFailed", f"cannot create {what}, the operator retries: {error}")
    return None


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
        for name in ctx.issued.keys() - {item["metadata"]["name"] for item in found}:
            del ctx.issued[name]
