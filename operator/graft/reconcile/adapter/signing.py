"""Sign the versions that the operator has verified, and read the keys for this.

Only the operator signs. Training pods run models and data of others, so they hold no key. A signature proves that this
operator, or one with the same keys, has read every byte. So when the keys change, a version with a signature by a
trusted key is signed again without being read. A version without such a signature is read first.
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

KEYS_SECONDS = 15.0  # between two reads of the Secret: the operator notices a rotation within this time


def statement_of(adapter: Adapter) -> Statement:
    """Return the statement that a signature of the Adapter covers (PURE)."""
    spec, artifact = adapter.spec, adapter.published
    return Statement(adapter.metadata.namespace, spec.adapter, spec.version, artifact.uri, artifact.digest)


def doubtful(ctx: Context, adapter: Adapter, ready: Condition) -> bool:
    """Return whether a Ready version has no signature by a trusted key.

    Its files must then be read before it is signed.
    """
    if ready.status != "True" or ctx.keys is None:  # without keys no signature can be checked or made
        return False
    if adapter.status.signature is None:
        return True
    try:
        verify(adapter.status.signature, statement_of(adapter), ctx.keys.public)
    except SignatureInvalid:
        return True
    return False


async def renewed(ctx: Context, adapter: Adapter, ready: Condition) -> tuple[AdapterStatus, float | None]:
    """Sign a version that is not doubtful by the current key.

    Return its status, and the seconds until a retry or None.
    """
    status = adapter.status
    current = status.signature is not None and ctx.keys is not None and status.signature.key_id == ctx.keys.key_id
    if ready.status != "True" or ctx.keys is None or current:
        return status, None
    try:
        return status.model_copy(update={"signature": await _sign(ctx, ctx.keys, adapter)}), None
    except StoreError as error:
        log.warning("cannot store the signature by the new key, retrying later: %s", error)
        return status, WAITING


def unavailable(ctx: Context) -> Condition:
    """Return the condition Ready of a version that waits for the signing keys."""
    settings = ctx.settings
    text = f"cannot use the signing keys in Secret {settings.namespace}/{settings.signing.secret}, the version waits: {ctx.keys_trouble}"
    return condition("Adapter", "Ready", "Unknown", "SigningKeyUnavailable", text)


async def signed(
    ctx: Context, keys: Keys, adapter: Adapter, status: AdapterStatus, verdict: Condition
) -> tuple[AdapterStatus, Condition]:
    """Return the status and the verdict of a verification.

    A Ready version gets a signature. A False verdict removes it.
    """
    if verdict.status == "False":
        return status.model_copy(update={"signature": None}), verdict
    if verdict.status != "True":
        return status, verdict
    try:
        return status.model_copy(update={"signature": await _sign(ctx, keys, adapter)}), verdict
    except StoreError as error:
        waiting = status.model_copy(update={"stage": "Verifying"})
        return waiting, condition(
            "Adapter",
            "Ready",
            "Unknown",
            "StorageUnavailable",
            f"cannot store the signature, the operator retries: {error}",
        )


async def _sign(ctx: Context, keys: Keys, adapter: Adapter) -> AdapterSignature:
    """Sign a version. In the operator's bucket, also store the signature beside the manifest. Raises StoreError."""
    statement = statement_of(adapter)
    signature = sign(keys, statement)
    bucket, prefix = layout.split_s3_uri(statement.uri)
    if bucket == ctx.store.config.bucket:
        text = document(statement, signature)
        await ctx.stored(adapter.metadata.namespace, lambda store: store.put(prefix + layout.SIGNATURE, text))
    return signature


async def refresh(ctx: Context) -> bool:
    """Read the keys and publish their public parts.

    Return whether the keys changed. After an error, the known keys stay in use.
    """
    try:
        keys = await _read(ctx)
        await _publish(ctx, keys)  # before the first signature, so that agents know the key when they need it
    except (KubeError, KeysInvalid) as error:
        ctx.keys_trouble = str(error)
        log.warning("cannot read or publish the signing keys: %s", error, extra={"secret": ctx.settings.signing.secret})
        return False
    if ctx.keys == keys:
        return False
    ctx.keys, ctx.keys_trouble = keys, ""
    log.info("read new signing keys", extra={"key_id": keys.key_id, "trusted": sorted(keys.public)})
    return True


async def _read(ctx: Context) -> Keys:
    settings = ctx.settings
    secret = await ctx.kube.get("Secret", settings.namespace, settings.signing.secret)
    if secret is None:
        if not settings.signing.create:
            raise KeysInvalid("the Secret does not exist. Create it as described in docs/signatures.md")
        secret = signing_secret(settings, now()[:10], generate())
        await ctx.kube.create(secret)  # a 409 means that another writer was first: the next refresh reads its Secret
    try:
        data = secret.get("data") or {}
        return read_keys({name: base64.b64decode(value, validate=True) for name, value in data.items()})
    except binascii.Error as error:
        raise KeysInvalid("an entry of the Secret is not valid base64") from error


async def _publish(ctx: Context, keys: Keys) -> None:
    """Make the ConfigMap contain exactly the current public keys. A removed key must not stay trusted."""
    wanted = trusted_keys_config_map(ctx.settings, keys)
    live = await ctx.kube.get("ConfigMap", ctx.settings.namespace, TRUSTED_KEYS)
    there = (live or {}).get("data") or {}
    if live is None or there != wanted["data"]:
        await ctx.kube.apply(wanted)
    if foreign := sorted(set(there) - set(wanted["data"])):
        patch = {"data": dict.fromkeys(foreign)}
        await ctx.kube.merge_patch("ConfigMap", ctx.settings.namespace, TRUSTED_KEYS, patch)
