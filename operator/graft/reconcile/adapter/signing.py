"""The operator's signature of a version that it has verified, and the keys for it.

Only the operator signs: training pods run models and data of others and hold no key. A signature is proof that this operator, or one
with the same keys, has read every byte; so a version that carries one by a trusted key is signed anew without being read again when
the keys change, and one that carries none is read first.
"""

import base64
import binascii
import logging

from graft.api import Adapter
from graft.api.adapter import AdapterSignature, AdapterStatus
from graft.api.meta import Condition
from graft.artifacts import layout
from graft.artifacts.signing import (
    Keys,
    KeysInvalid,
    SignatureInvalid,
    Statement,
    document,
    generate,
    read_keys,
    sign,
    verify,
)
from graft.artifacts.storage import StoreError
from graft.contracts.agent import TRUSTED_KEYS
from graft.kube import KubeError
from graft.manifests.signing import signing_secret, trusted_keys_config_map
from graft.reconcile.shared.context import WAITING, Context
from graft.status import condition, now

log = logging.getLogger(__name__)

KEYS_SECONDS = 15.0  # between two looks at the Secret: a rotation is noticed within that time


def statement_of(adapter: Adapter) -> Statement:
    """What a signature of the Adapter says (PURE)."""
    spec, artifact = adapter.spec, adapter.published
    return Statement(adapter.metadata.namespace, spec.adapter, spec.version, artifact.uri, artifact.digest)


def doubtful(ctx: Context, adapter: Adapter, ready: Condition) -> bool:
    """Whether a Ready version carries no signature by a key of ours, and so has to be read before it is signed."""
    if ready.status != "True" or ctx.keys is None:  # without keys nothing can be told, or signed
        return False
    if adapter.status.signature is None:
        return True
    try:
        verify(adapter.status.signature, statement_of(adapter), ctx.keys.public)
    except SignatureInvalid:
        return True
    return False


async def renewed(ctx: Context, adapter: Adapter, ready: Condition) -> tuple[AdapterStatus, float | None]:
    """The status of a version that is not doubtful, signed by the current key; the seconds until the next look, or None."""
    status = adapter.status
    current = status.signature is not None and ctx.keys is not None and status.signature.key_id == ctx.keys.key_id
    if ready.status != "True" or ctx.keys is None or current:
        return status, None
    try:
        return status.model_copy(update={"signature": await _sign(ctx, ctx.keys, adapter)}), None
    except StoreError as error:
        log.warning("not signed by the new key, tried again later: %s", error)
        return status, WAITING


def unavailable(ctx: Context) -> Condition:
    """What a version is told that waits for the keys."""
    settings = ctx.settings
    text = f"the keys in Secret {settings.namespace}/{settings.signing.secret} cannot be used: {ctx.keys_trouble}"
    return condition("Adapter", "Ready", "Unknown", "SigningKeyUnavailable", text)


async def signed(
    ctx: Context, keys: Keys, adapter: Adapter, status: AdapterStatus, verdict: Condition
) -> tuple[AdapterStatus, Condition]:
    """Status and verdict of a verification, with the signature of what is Ready."""
    if verdict.status == "False":
        return status.model_copy(update={"signature": None}), verdict
    if verdict.status != "True":
        return status, verdict
    try:
        return status.model_copy(update={"signature": await _sign(ctx, keys, adapter)}), verdict
    except StoreError as error:
        waiting = status.model_copy(update={"stage": "Verifying"})
        return waiting, condition("Adapter", "Ready", "Unknown", "StorageUnavailable", f"signing: {error}")


async def _sign(ctx: Context, keys: Keys, adapter: Adapter) -> AdapterSignature:
    """Sign, and put the signature beside the manifest where the bucket is ours. StoreError."""
    statement = statement_of(adapter)
    signature = sign(keys, statement)
    bucket, prefix = layout.split_s3_uri(statement.uri)
    if bucket == ctx.store.config.bucket:
        await ctx.blocking(ctx.store.put, prefix + layout.SIGNATURE, document(statement, signature))
    return signature


async def refresh(ctx: Context) -> bool:
    """Read the keys and publish their public parts; whether they are others than before. What is known stays while it fails."""
    try:
        keys = await _read(ctx)
        await _publish(ctx, keys)  # before the first signature: agents should know a key when they meet it
    except (KubeError, KeysInvalid) as error:
        ctx.keys_trouble = str(error)
        log.warning("signing keys: %s", error, extra={"secret": ctx.settings.signing.secret})
        return False
    if ctx.keys == keys:
        return False
    ctx.keys, ctx.keys_trouble = keys, ""
    log.info("signing keys", extra={"key_id": keys.key_id, "trusted": sorted(keys.public)})
    return True


async def _read(ctx: Context) -> Keys:
    settings = ctx.settings
    secret = await ctx.kube.get("Secret", settings.namespace, settings.signing.secret)
    if secret is None:
        if not settings.signing.create:
            raise KeysInvalid("the Secret does not exist; make it as docs/signatures.md says")
        secret = signing_secret(settings, now()[:10], generate())
        await ctx.kube.create(secret)  # a 409: somebody else was first, and the next look reads it
    try:
        data = secret.get("data") or {}
        return read_keys({name: base64.b64decode(value, validate=True) for name, value in data.items()})
    except binascii.Error as error:
        raise KeysInvalid("an entry of the Secret is no base64") from error


async def _publish(ctx: Context, keys: Keys) -> None:
    """Exactly our keys in the ConfigMap: one that is taken away must not go on being trusted."""
    wanted = trusted_keys_config_map(ctx.settings, keys)
    live = await ctx.kube.get("ConfigMap", ctx.settings.namespace, TRUSTED_KEYS)
    there = (live or {}).get("data") or {}
    if live is None or there != wanted["data"]:
        await ctx.kube.apply(wanted)
    if foreign := sorted(set(there) - set(wanted["data"])):
        patch = {"data": dict.fromkeys(foreign)}
        await ctx.kube.merge_patch("ConfigMap", ctx.settings.namespace, TRUSTED_KEYS, patch)
