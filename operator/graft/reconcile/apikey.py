"""Reconcile an ApiKey: make its key once, and tell the gateways its SHA-256.

The key is in the Secret graft-api-keys of its namespace, and nowhere else. What is in the Secret counts: a key that somebody
removes from it is revoked, and a new one is made. The gateways learn a key before it is in the Secret, so that whoever
reads it can use it.
"""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from graft.api import ApiKey
from graft.api.apikey import ApiKeyStatus
from graft.api.meta import Condition
from graft.artifacts.layout import why_reserved
from graft.bounded import OutOfBounds
from graft.contracts.apikeys import (
    API_KEYS_SECRET,
    GRANT_KEY,
    KEY,
    STATE,
    Accepted,
    Grant,
    KeyState,
    new_api_key,
)
from graft.contracts.enginekeys import fingerprint
from graft.contracts.usage import USAGE_CONFIGMAP, Allowance, Usage, month_of, usage_key
from graft.kube import KubeError, Manifest
from graft.manifests.apikeys import api_keys_secret, encoded, grant_config_map, grant_name, usage_config_map
from graft.reconcile.claims import Claim
from graft.reconcile.shared.access import Trouble, refusal_of, tenant_of_namespace
from graft.reconcile.shared.context import WAITING, Context
from graft.reconcile.shared.ending import delete_grant
from graft.status import condition

KIND = "ApiKey"
RECHECK = 600.0  # seconds until the Secret is read again: RBAC allows only a GET by name
NEARLY = 0.8  # of the tokens of a month, from which on a condition warns
MOST_KEYS = 500  # of a namespace: all gateways hold all keys, and share one ConfigMap for their limits
SHOWN = 12  # hexadecimal digits of a fingerprint that the status shows


@dataclass(frozen=True)
class Held:
    """A key of a Secret, and since when it is there. `state` is None if the Secret does not say it."""

    key: str
    state: KeyState | None


async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile one ApiKey. Return the seconds until the next reconcile, or None if it does not exist."""
    raw = await ctx.cache.get(KIND, namespace, name)
    if raw is None:
        return None
    api_key = ApiKey.model_validate(raw)
    if api_key.metadata.deletion_timestamp:
        await delete_grant(ctx, api_key)
        await _forget(ctx, api_key)
        await ctx.remove_finalizer(api_key, KIND)
        return None
    raw = await ctx.claim(raw, {})
    if raw is None:
        return None
    api_key = ApiKey.model_validate(raw)
    made = too_many(raw, await ctx.cache.every(KIND, turn_of, namespace)) or await _made(ctx, api_key)
    at = datetime.now(UTC)
    if not isinstance(made, Trouble):
        await _publish(ctx, api_key, accepted(api_key, made, at))
    elif (there := await _published(ctx, api_key)) is not None:
        # The Secret cannot be read or written now. A change of the spec holds for the keys that are known.
        await _publish(ctx, api_key, there.keys)
    status, observed = observe(api_key, made, at)
    limits = api_key.spec.limits
    if limits is not None and (limit := limits.tokens_per_month) is not None:
        spent = await _month(ctx, api_key, at)
        status = status.model_copy(update={"tokens_this_month": spent})
        observed.append(within(limit, spent))
    await ctx.write_status(raw, status, observed)
    if isinstance(made, Trouble):
        return RECHECK if made.reason == "TooManyKeys" else WAITING
    return until_next(api_key, made, at)


def turn_of(raw: Manifest) -> tuple[str, str]:
    """Return what sorts the ApiKeys of a namespace: the oldest first."""
    return str(raw["metadata"].get("creationTimestamp") or ""), str(raw["metadata"]["name"])


def too_many(raw: Manifest, turns: Iterable[tuple[str, str]]) -> Trouble | None:
    """Return why an ApiKey gets no key, if its namespace has MOST_KEYS older ones (PURE). `turns`: of all of them."""
    own = turn_of(raw)
    if sum(turn < own for turn in turns) < MOST_KEYS:
        return None
    text = f"the namespace has {MOST_KEYS} older ApiKeys, and no more of them work. Delete those that are not used"
    return Trouble("TooManyKeys", f"{text}. The operator looks again every {RECHECK / 60:.0f} minutes")


async def _made(ctx: Context, api_key: ApiKey) -> Held | Trouble | None:
    """Return the key, which is made if there is none or if a rotation asks for one. None if the user has made it."""
    namespace = api_key.metadata.namespace
    if api_key.spec.sha256 is not None:
        await _forget(ctx, api_key)
        return None
    try:
        async with ctx.locks.hold(API_KEYS_SECRET, namespace):
            secret = await ctx.kube.get("Secret", namespace, API_KEYS_SECRET)
            if secret is not None and not _ours(secret):
                return Trouble(
                    "SecretTaken",
                    f"Secret {API_KEYS_SECRET} of namespace {namespace} is not Graft's. Rename it, and the operator continues",
                )
            held = held_in(secret, api_key.metadata.name)
            wanted = next_key(api_key, held, datetime.now(UTC))
            if wanted is not held:
                await _publish(ctx, api_key, accepted(api_key, wanted, datetime.now(UTC)))
                await _keep(ctx, api_key, wanted, secret)
            return wanted
    except KubeError as error:
        if error.status == 409:
            raise  # another writer was first: what it has written is read again
        refused = refusal_of(ctx, namespace, f"Secret {API_KEYS_SECRET}", error)
        if refused is None:
            raise
        return refused


def held_in(secret: Manifest | None, name: str) -> Held | None:
    """Return the key in the entry with this name, or None if there is none that the operator has made (PURE).

    A key of another form may be short enough to be guessed.
    """
    entries = decoded((secret or {}).get("data") or {}, name)
    key = entries.get(name, "")
    if not KEY.fullmatch(key):
        return None
    try:
        state = KeyState.read(entries.get(name + STATE, ""))
        for time in (state.since, state.previous_until or state.since):
            if _text(datetime.fromisoformat(time)) != time:  # the status could not show it
                raise ValueError(time)
    except (OutOfBounds, ValueError):
        return Held(key, None)
    return Held(key, state)


def decoded(data: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the entries of one ApiKey in the `data` of a Secret as texts (PURE). Entries that are no texts are left out."""
    found = {}
    for entry in (name, name + STATE):
        try:
            found[entry] = base64.b64decode(data.get(entry, ""), validate=True).decode()
        except ValueError:
            continue
    return found


def next_key(api_key: ApiKey, held: Held | None, at: datetime) -> Held:
    """Return the key that the Secret should have: `held`, or another object if something must be written (PURE)."""
    wanted = api_key.spec.rotation or 0
    if held is None or held.state is None:
        return Held(held.key if held else new_api_key(), KeyState(rotation=wanted, since=_text(at)))
    if held.state.rotation == wanted:
        return held
    until = _text(at + timedelta(seconds=api_key.spec.overlap_seconds))
    state = KeyState(rotation=wanted, since=_text(at), previous=fingerprint(held.key), previous_until=until)
    return Held(new_api_key(), state)


def accepted(api_key: ApiKey, held: Held | None, at: datetime) -> list[Accepted]:
    """Return the keys that gateways accept (PURE)."""
    if held is None:
        return [Accepted(sha256=item) for item in api_key.spec.sha256 or []]
    found, state = [Accepted(sha256=fingerprint(held.key))], held.state
    if state is not None and state.previous is not None and state.previous_until is not None:
        until = _seconds(state.previous_until)
        if until > at.timestamp():
            found.append(Accepted(sha256=state.previous, until=until))
    return found


def grant_of(api_key: ApiKey, keys: list[Accepted], tenant: Claim | None = None) -> Grant:
    """Return what gateways learn of an ApiKey (PURE). `tenant`: which has the namespace."""
    namespace, spec = api_key.metadata.namespace, api_key.spec
    return Grant(
        namespace=namespace,
        name=api_key.metadata.name,
        keys=keys,
        models=None if spec.models is None else [f"{namespace}/{route}" for route in spec.models],
        expires=None if spec.expires_at is None else _seconds(spec.expires_at),
        end_streams=spec.end_streams,
        allowance=None if spec.limits is None else Allowance.model_validate(spec.limits.model_dump()),
        tenant=tenant.tenant if tenant else None,
        tenant_allowance=Allowance.model_validate(dict(tenant.limits)) if tenant and tenant.limits else None,
    )


async def _publish(ctx: Context, api_key: ApiKey, keys: list[Accepted]) -> None:
    tenant = await tenant_of_namespace(ctx, api_key.metadata.namespace)
    if api_key.spec.limits is not None or (tenant is not None and tenant.limits):
        await ctx.kube.ensure(usage_config_map(ctx.settings))  # gateways write its entries, and do not create it
    await ctx.kube.ensure(grant_config_map(api_key, grant_of(api_key, keys, tenant), ctx.settings))


async def _published(ctx: Context, api_key: ApiKey) -> Grant | None:
    found = await ctx.cache.get("ConfigMap", ctx.settings.namespace, grant_name(api_key))
    try:
        return Grant.read(found["data"][GRANT_KEY]) if found else None
    except (KeyError, OutOfBounds):
        return None


async def _month(ctx: Context, api_key: ApiKey, at: datetime) -> int:
    """Return the tokens that gateways have leased for a key in this month."""
    found = await ctx.kube.get("ConfigMap", ctx.settings.namespace, USAGE_CONFIGMAP)
    text = ((found or {}).get("data") or {}).get(usage_key(api_key.metadata.namespace, api_key.metadata.name))
    try:
        month = Usage.read(text).month if text else None
    except OutOfBounds:
        return 0  # the gateways begin anew
    return month.tokens if month is not None and month.start == month_of(at.timestamp()) else 0


def within(limit: int, spent: int) -> Condition:
    """Return the condition WithinLimits (PURE). `limit`, `spent`: tokens of a month."""
    text = f"{spent} of {limit} tokens of this month are used"
    if spent >= limit:
        return condition(
            KIND, "WithinLimits", "False", "MonthUsed", f"{text}. Requests are refused until the next month"
        )
    if spent >= NEARLY * limit:
        return condition(KIND, "WithinLimits", "True", "MonthNearlyUsed", text)
    # The message does not change with each request, so the status does not, either.
    return condition(KIND, "WithinLimits", "True", "AsExpected", f"less than {NEARLY:.0%} of {limit} tokens are used")


async def _keep(ctx: Context, api_key: ApiKey, held: Held, secret: Manifest | None) -> None:
    """Write the key into the Secret, over the state that was read. Raises KubeError 409 if another has written it."""
    meta = api_key.metadata
    entries = {meta.name: held.key} | ({meta.name + STATE: held.state.json_text()} if held.state else {})
    data = encoded(entries)
    if secret is None:
        await ctx.kube.create(api_keys_secret(meta.namespace) | {"data": data})
        return
    found = secret["metadata"]
    patch = {"metadata": {"uid": found["uid"], "resourceVersion": found["resourceVersion"]}, "data": data}
    if await ctx.kube.merge_patch("Secret", meta.namespace, API_KEYS_SECRET, patch) is None:
        raise KubeError(409, "Conflict", f"Secret {API_KEYS_SECRET} was deleted meanwhile")


async def _forget(ctx: Context, api_key: ApiKey) -> None:
    """Remove the entries of an ApiKey from the Secret, and the Secret with its last entry."""
    meta = api_key.metadata
    if why_reserved(meta.namespace) is not None:
        return
    try:
        async with ctx.locks.hold(API_KEYS_SECRET, meta.namespace):
            secret = await ctx.kube.get("Secret", meta.namespace, API_KEYS_SECRET)
            gone = {meta.name, meta.name + STATE}
            if secret is None or not _ours(secret) or not gone & set(secret.get("data") or {}):
                return
            found = secret["metadata"]
            if set(secret["data"]) <= gone:
                await ctx.kube.delete("Secret", meta.namespace, API_KEYS_SECRET, found["uid"])
                return
            patch = {"metadata": {"uid": found["uid"], "resourceVersion": found["resourceVersion"]}}
            await ctx.kube.merge_patch(
                "Secret", meta.namespace, API_KEYS_SECRET, patch | {"data": dict.fromkeys(sorted(gone))}
            )
    except KubeError as error:
        # While a namespace is deleted, the operator may lose its rights before the ApiKey goes. The gateways have
        # forgotten the key already.
        if error.status != 403:
            raise


def _ours(secret: Manifest) -> bool:
    labels = secret["metadata"].get("labels") or {}
    return bool(labels.get("app.kubernetes.io/managed-by") == "graft")


def observe(api_key: ApiKey, made: Held | Trouble | None, at: datetime) -> tuple[ApiKeyStatus, list[Condition]]:
    """Return the status of an ApiKey (PURE)."""
    if isinstance(made, Trouble):
        before = api_key.status.model_copy(update={"stage": "Waiting"})
        return before, [condition(KIND, "Ready", "False", made.reason, made.message)]
    if made is None:
        sums = api_key.spec.sha256 or []
        status = ApiKeyStatus(conditions=[], fingerprint=sums[-1][:SHOWN])
        reason, text = "HashGiven", "the gateways accept the keys whose SHA-256 sums spec.sha256 has"
    else:
        state = made.state
        status = ApiKeyStatus(
            conditions=[],
            secret_name=API_KEYS_SECRET,
            fingerprint=fingerprint(made.key)[:SHOWN],
        )
        if state is not None:
            until = state.previous_until if len(accepted(api_key, made, at)) > 1 else None
            since = {"rotation": state.rotation, "rotated_at": state.since, "previous_until": until}
            status = status.model_copy(update=since)
        reason = "Issued"
        text = f"the key is in Secret {API_KEYS_SECRET}, entry {api_key.metadata.name}. The gateways accept it"
        if status.previous_until is not None:
            text += f", and the key before it until {status.previous_until}"
    expires = api_key.spec.expires_at
    if expires is not None and _seconds(expires) <= at.timestamp():
        text = f"the key has expired at {expires}. Set a later spec.expiresAt, or delete the ApiKey"
        return _in_stage(status, "Expired"), [condition(KIND, "Ready", "False", "Expired", text)]
    if expires is not None:
        text += f". It expires at {expires}"
    return _in_stage(status, "Ready"), [condition(KIND, "Ready", "True", reason, text)]


def _in_stage(status: ApiKeyStatus, stage: str) -> ApiKeyStatus:
    return status.model_copy(update={"stage": stage})


def until_next(api_key: ApiKey, held: Held | None, at: datetime) -> float:
    """Return the seconds until something changes by itself, or until the Secret is read again (PURE)."""
    ends = [item.until for item in accepted(api_key, held, at) if item.until is not None]
    if api_key.spec.expires_at is not None:
        ends.append(_seconds(api_key.spec.expires_at))
    left = [end - at.timestamp() for end in ends if end > at.timestamp()]
    return min([RECHECK, *(seconds + 1.0 for seconds in left)])


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
