"""The keys of all objects in the bucket (PURE).

<tenant>/adapters/<name>/<version>/   the files of a version. Only the operator writes here; manifest.json is last. It adds
                                      manifest.sig.json after it has verified all files
<tenant>/adapters/.namespace.json     the UID of the namespace that the files belong to, of Tenants only (inheritance.py)
<tenant>/runs/<job-uid>/<attempt>/    what one attempt of a job writes: progress.json, events.jsonl, version/ (the files
                                      to publish) and checkpoints/step-000100/rank-0000.safetensors, rank-0000.json (the
                                      receipt, last)
<tenant>/runs/<job-uid>/version.json  the manifest of the attempt whose version/ is published
models/<name>/…                       base models, readable by all tenants
"""

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig.json"
PROGRESS = "progress.json"
EVENTS = "events.jsonl"
MODELS_PREFIX = "models/"
CHECKPOINTS = "checkpoints/"
VERSIONS = "adapters/"  # of a tenant
USER_PREFIX = "graft-"  # of the tenants' users of the store


# Namespaces that cannot be tenants: their prefix, or the name of their user of the store, has another use.
RESERVED = {
    MODELS_PREFIX.rstrip("/"): f"{MODELS_PREFIX} in the bucket holds the base models of all tenants",
    "root": "the user graft-root of the store has all rights on it",
}


def tenant_of(namespace: str) -> str:
    """Return the tenant's path segment. There are no Tenant resources yet, so it is the namespace's name."""
    return namespace


def why_reserved(namespace: str, own_user: str = "") -> str | None:
    """Return why a namespace cannot be a tenant, or None. `own_user`: the operator's own user of the store."""
    if namespace in RESERVED:
        return RESERVED[namespace]
    if f"{USER_PREFIX}{tenant_of(namespace)}" == own_user:
        return f"the operator itself is the user {own_user} of the store"
    return None


def tenant_prefix(tenant: str) -> str:
    return f"{tenant}/"


def adapter_versions_prefix(tenant: str, adapter: str) -> str:
    return f"{tenant}/adapters/{adapter}/"


def adapter_prefix(tenant: str, adapter: str, version: str) -> str:
    return f"{tenant}/adapters/{adapter}/{version}/"


def run_prefix(tenant: str, job_uid: str) -> str:
    return f"{tenant}/runs/{job_uid}/"


def attempt_prefix(tenant: str, job_uid: str, attempt: str) -> str:
    return f"{tenant}/runs/{job_uid}/{attempt}/"


def checkpoint_prefix(attempt: str, step: int, *, final: bool = False) -> str:
    """Return the prefix of an attempt's checkpoint after `step` steps, relative to the run's prefix.

    `final`: after the last step.
    """
    return f"{attempt}/{CHECKPOINTS}step-{step:06d}{'-final' if final else ''}/"


def s3_uri(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}"


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of s3://bucket/key. Raises ValueError for any other URI."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise ValueError(f"not an s3:// URI with a bucket and a key: {uri}")
    return bucket, key


def in_tenants_part(uri: str, bucket: str, tenant: str) -> bool:
    """Return whether a URI names the tenant's own part of this bucket, or an object below it.

    The operator reads files only if this check passes, so the check is strict. It returns False in these cases: the
    slash after the tenant's name is missing (another tenant's name may begin with it); another bucket has a folder of
    that name; the tenant's name is empty or reserved; the key has . or .. among its folders (some stores resolve them);
    the URI is not an s3:// URI with a key.
    """
    try:
        found, key = split_s3_uri(uri)
    except ValueError:
        return False
    if not tenant or tenant in RESERVED or found != bucket or not key.startswith(tenant_prefix(tenant)):
        return False
    return not {".", ".."} & set(key.split("/"))


def outside_tenants_part(uri: str, bucket: str, tenant: str) -> bool:
    """Return whether a URI names this bucket or an object in it, outside the tenant's part.

    It returns False for other buckets, the Hub and volumes. The rights of the tenant's key decide about those.
    """
    return f"{uri}/".startswith(s3_uri(bucket, "")) and not in_tenants_part(uri, bucket, tenant)
