"""Issue keys of the object store through versitygw's identity service: one per tenant, limited to the tenant's prefix.

The admin API (versitygw's s3api/controllers/admin.go, v1.8) takes XML over PATCH. The root key signs the requests with
SigV4 for the service s3. A bucket policy allows each user its own prefix and the shared base models. Only one process
may write users and policy at a time: the operator.
"""

import json
import secrets
import xml.etree.ElementTree as ET
from typing import Any
from urllib.parse import quote

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from graft.artifacts.layout import MODELS_PREFIX, tenant_prefix
from graft.artifacts.storage import StorageConfig, StoreError, Trouble
from graft.artifacts.store import S3Store

USER_PREFIX = "graft-"
MARK = "Graft"  # a Sid that begins so marks Graft's statements; all others in the policy stay unchanged


class VersityIdentity:
    """The users of the store and their rights on one bucket."""

    def __init__(self, store: S3Store, admin_url: str) -> None:
        self._store = store
        self._admin_url = admin_url.rstrip("/")
        ca = store.config.ca_file
        self._http = (
            urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=20), ca_certs=ca)
            if ca
            else urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=20))
        )

    def issue(self, tenant: str) -> StorageConfig:
        """Create a new key for a tenant and return its configuration. An older key of the tenant stops working."""
        user, secret = USER_PREFIX + tenant, secrets.token_urlsafe(30)
        if user in self.users():
            self._set_policy(lambda tenants: tenants - {tenant})
            self._admin(f"/delete-user?access={quote(user)}")
        self._admin(
            "/create-user",
            f"<Account><Access>{user}</Access><Secret>{secret}</Secret><Role>user</Role></Account>",
        )
        self._set_policy(lambda tenants: tenants | {tenant})
        own = self._store.config
        return StorageConfig(
            endpoint=own.endpoint,
            region=own.region,
            bucket=own.bucket,
            prefix=tenant_prefix(tenant),
            access_key_id=user,
            secret_access_key=secret,
            ca_file=own.ca_file,
        )

    def revoke(self, tenant: str) -> None:
        """Delete a tenant's key. It is no error if the tenant has none."""
        self._set_policy(lambda tenants: tenants - {tenant})
        if USER_PREFIX + tenant in self.users():
            self._admin(f"/delete-user?access={quote(USER_PREFIX + tenant)}")

    def tenants(self) -> set[str]:
        """Return the tenants that have a key."""
        return {user.removeprefix(USER_PREFIX) for user in self.users() if user.startswith(USER_PREFIX)}

    def users(self) -> set[str]:
        """Return all users of the store."""
        root = ET.fromstring(self._admin("/list-users") or b"<none/>")  # noqa: S314 - our own store's answer
        return {element.text or "" for element in root.iter() if element.tag.rpartition("}")[2] == "Access"}

    def _set_policy(self, change: Any) -> None:
        policy = self._policy()
        there = policy.get("Statement", [])
        kept = [item for item in there if not str(item.get("Sid", "")).startswith(MARK)]
        statements = kept + bucket_statements(self._store.config.bucket, sorted(change(_tenants(policy))))
        if statements == there:
            return
        client, bucket = self._store.client, self._store.config.bucket
        try:
            if statements:
                client.put_bucket_policy(
                    Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements})
                )
            elif policy:
                client.delete_bucket_policy(Bucket=bucket)
        except Exception as error:
            raise StoreError("unavailable", f"cannot change the bucket policy of {bucket}: {error}") from error

    def _policy(self) -> dict[str, Any]:
        try:
            answer = self._store.client.get_bucket_policy(Bucket=self._store.config.bucket)
        except Exception as error:
            if "NoSuchBucketPolicy" in str(error):
                return {}
            raise StoreError(
                "unavailable", f"cannot read the bucket policy of {self._store.config.bucket}: {error}"
            ) from error
        return dict(json.loads(answer["Policy"]))

    def _admin(self, path: str, body: str = "") -> bytes:
        own = self._store.config
        request = AWSRequest(method="PATCH", url=self._admin_url + path, data=body.encode())
        S3SigV4Auth(Credentials(own.access_key_id, own.secret_access_key), "s3", own.region).add_auth(request)
        prepared = request.prepare()
        try:
            answer = self._http.request(
                "PATCH", prepared.url, headers=dict(prepared.headers), body=body.encode(), retries=2
            )
        except urllib3.exceptions.HTTPError as error:
            raise StoreError("unavailable", f"cannot call the identity service {self._admin_url}: {error}") from error
        if answer.status >= 300:
            trouble: Trouble = "denied" if answer.status in {401, 403} else "unavailable"
            raise StoreError(
                trouble,
                f"the identity service answered {answer.status} to {path.split('?')[0]}: {answer.data[:300]!r}",
            )
        return answer.data


def bucket_statements(bucket: str, tenants: list[str]) -> list[dict[str, Any]]:
    """Return the policy statements of the tenants' users (PURE).

    Each user may read and write below its own prefix, delete only below its runs/, and read the base models.
    """
    statements: list[dict[str, Any]] = []
    for tenant in tenants:
        principal, prefix = {"AWS": [USER_PREFIX + tenant]}, tenant_prefix(tenant)
        statements += [
            {
                "Sid": f"{MARK}Own{tenant}",
                "Effect": "Allow",
                "Principal": principal,
                "Action": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
                "Resource": [f"arn:aws:s3:::{bucket}/{prefix}*"],
            },
            {
                "Sid": f"{MARK}Runs{tenant}",  # to delete staged files and old checkpoints
                "Effect": "Allow",
                "Principal": principal,
                "Action": ["s3:DeleteObject"],
                "Resource": [f"arn:aws:s3:::{bucket}/{prefix}runs/*"],
            },
            {
                "Sid": f"{MARK}List{tenant}",
                "Effect": "Allow",
                "Principal": principal,
                "Action": ["s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
                "Condition": {"StringLike": {"s3:prefix": [f"{prefix}*", f"{MODELS_PREFIX}*"]}},
            },
        ]
    if tenants:
        statements.append(
            {
                "Sid": f"{MARK}Models",
                "Effect": "Allow",
                "Principal": {"AWS": [USER_PREFIX + tenant for tenant in tenants]},
                "Action": ["s3:GetObject"],
                "Resource": [f"arn:aws:s3:::{bucket}/{MODELS_PREFIX}*"],
            }
        )
    return statements


def _tenants(policy: dict[str, Any]) -> set[str]:
    own = f"{MARK}Own"
    return {
        str(item["Sid"]).removeprefix(own)
        for item in policy.get("Statement", [])
        if str(item.get("Sid", "")).startswith(own)
    }
