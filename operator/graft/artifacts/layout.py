"""Where things are in the bucket (PURE).

<tenant>/adapters/<name>/<version>/   the files of a version; manifest.json is written last. The operator adds manifest.sig.json,
                                      once it has verified them all
<tenant>/runs/<job-uid>/<attempt>/    what one attempt of a job writes: progress.json, events.jsonl and
                                      checkpoints/step-000100/rank-0000.safetensors, rank-0000.json (the receipt, last)
models/<name>/…                       base models, readable by all tenants
"""

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig.json"
PROGRESS = "progress.json"
EVENTS = "events.jsonl"
MODELS_PREFIX = "models/"
CHECKPOINTS = "checkpoints/"


def tenant_of(namespace: str) -> str:
    """The tenant's path segment; the namespace's name, until Tenant resources say otherwise."""
    return namespace


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
    """Below the run's prefix: the checkpoint that an attempt wrote after so many steps, `final` after the last."""
    return f"{attempt}/{CHECKPOINTS}step-{step:06d}{'-final' if final else ''}/"


def s3_uri(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}"


def split_s3_uri(uri: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key. ValueError for anything else."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket or not key:
        raise ValueError(f"not an s3:// URI with a bucket and a key: {uri}")
    return bucket, key


def in_tenants_part(uri: str, bucket: str, tenant: str) -> bool:
    """Whether a URI names the tenant's own part of this bucket, or something below it.

    Files are read on the strength of it, so it is strict: False without the slash after the tenant's name (another's may begin with
    it), in a bucket that merely has a folder of that name, for a tenant without a name, for a key with . or .. among its folders, which
    some stores follow, and for what is no s3:// URI with a key.
    """
    try:
        found, key = split_s3_uri(uri)
    except ValueError:
        return False
    if not tenant or found != bucket or not key.startswith(tenant_prefix(tenant)):
        return False
    return not {".", ".."} & set(key.split("/"))


def outside_tenants_part(uri: str, bucket: str, tenant: str) -> bool:
    """Whether a URI names this bucket or something in it, and not the tenant's part.

    False for other buckets, the Hub and volumes: the layout says nothing of them, the rights of the tenant's key do.
    """
    return f"{uri}/".startswith(s3_uri(bucket, "")) and not in_tenants_part(uri, bucket, tenant)
