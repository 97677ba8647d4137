"""The keys with which gateways call engines: their Secret, and what the engines of a deployment may know of them.

The operator makes the root keys once. If somebody deletes their Secret, the operator creates it again with the same keys,
so that no request fails. It writes no key anywhere else: engines get SHA-256 sums, in the wanted ConfigMap.
"""

import logging

from graft.contracts.agent import Wanted
from graft.contracts.enginekeys import (
    GATEWAY_KEYS,
    SENDS_KEYS,
    RootKeysInvalid,
    deployment_key,
    fingerprint,
    new_key,
    root_keys,
)
from graft.kube import KubeError
from graft.manifests.gatewaykeys import gateway_keys_secret
from graft.reconcile.shared import pods
from graft.reconcile.shared.access import Trouble
from graft.reconcile.shared.context import Context
from graft.status import now

log = logging.getLogger(__name__)


async def refresh(ctx: Context) -> bool:
    """Read the root keys, and create their Secret if it does not exist. Return whether the keys changed.

    After an error, the known keys stay in use.
    """
    place = ctx.settings.namespace
    try:
        secret = await ctx.kube.get("Secret", place, GATEWAY_KEYS)
        if secret is None:
            made = ctx.gateway_roots or {f"{now()[:10]}.key": new_key().encode()}
            await ctx.kube.create(gateway_keys_secret(ctx.settings, made))
            log.info("created the Secret with the keys of the gateways", extra={"secret": GATEWAY_KEYS})
            secret = await ctx.kube.get("Secret", place, GATEWAY_KEYS)
        roots = root_keys((secret or {}).get("data") or {})
    except (KubeError, RootKeysInvalid) as error:
        ctx.gateway_roots_trouble = str(error)
        log.warning("cannot read or create the keys of the gateways: %s", error, extra={"secret": GATEWAY_KEYS})
        return False
    ctx.gateway_roots_trouble = ""
    if roots == ctx.gateway_roots:
        return False
    ctx.gateway_roots = roots
    log.info("read the keys of the gateways", extra={"keys": sorted(roots)})
    return True


async def accepted(ctx: Context, uid: str, wanted: Wanted | None) -> list[str] | Trouble | None:
    """Return the SHA-256 sums of the keys that the engines of a deployment accept from gateways.

    Return None while gateways of an earlier release run, which send no key. A deployment whose engines ask for a key
    never goes back to that.
    """
    if ctx.gateway_roots is None:
        text = f"cannot use the keys of the gateways in Secret {ctx.settings.namespace}/{GATEWAY_KEYS}, the pods wait: "
        return Trouble("GatewayKeysUnavailable", text + ctx.gateway_roots_trouble)
    asked = wanted is not None and wanted.gateway_keys is not None
    if not asked and await _old_gateways(ctx):
        return None
    return [fingerprint(deployment_key(root, uid)) for root in ctx.gateway_roots.values()]


async def _old_gateways(ctx: Context) -> bool:
    found = await ctx.kube.list("Pod", ctx.settings.namespace, dict(ctx.settings.gateway_selector))
    return any(
        SENDS_KEYS not in (pod["metadata"].get("annotations") or {})
        for pod in found
        if pods.phase(pod) not in {"Failed", "Succeeded"}
    )
