"""Issue keys of the object store through versitygw's identity service: one per tenant, limited to the tenant's prefix.

The admin API (versitygw's s3api/controllers/admin.go, v1.8) takes XML over PATCH. The root key signs the requests with
SigV4 for the service s3. A bucket policy allows each user its own prefix and the base models that its tenant may use.

Several installations of Graft may use one store. The users of this installation have its id in their names, and its id is
in the Sids of its statements. Other users and statements are never changed or deleted. Earlier versions of Graft had no
ids and named users graft-<tenant>. Such a user belongs to this installation only if a statement of Graft in this
bucket's policy names the user.
"""

import hashlib
import json
import logging
import re
import secrets
import threading
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError
from botocore.utils import get_environ_proxies

from graft.artifacts.layout import MODELS_PREFIX, USER_PREFIX, VERSIONS, tenant_prefix
from graft.artifacts.storage import StorageConfig, StoreError, Trouble
from graft.artifacts.store import S3Store

log = logging.getLogger(__name__)

MARK = "Graft"  # the Sids of Graft's statements begin with it; all other statements in the policy stay unchanged
LEGACY = re.compile(rf"{MARK}(Own|Runs|List|Models)(.*)", re.DOTALL)  # Sids of versions without ids
LEGACY_MODELS = f"{MARK}Models"
USERS = "/list-users"  # the request that changes nothing
TRIAL = 4.0  # seconds for an answer to a request that tries a key
POLICY_LIMIT = 20 * 1024  # bytes of a bucket policy in S3; versitygw accepts more
Statement = dict[str, Any]


@dataclass(frozen=True)
class AllBut:
    """All tenants except some, also those that get a key later."""

    tenants: frozenset[str] = frozenset()


# prefix of a base model -> the tenants that may read it
Readers = Mapping[str, Collection[str] | AllBut]
EVERYBODY = AllBut()
ALL_MODELS: Readers = {MODELS_PREFIX: EVERYBODY}


def installation_id(bucket: str, installation: str) -> str:
    """Return the id of an installation: 10 hex digits, computed from its bucket and its name (PURE)."""
    return hashlib.sha256(f"{bucket}\n{installation}".encode()).hexdigest()[:10]


class VersityIdentity:
    """The users of the store that this installation has made, and their rights on its bucket."""

    def __init__(
        self,
        store: S3Store,
        admin_url: str,
        installation: str = "",
        models: Readers | None = ALL_MODELS,
    ) -> None:
        """Open the identity service. `installation` names this installation uniquely among those of the store.

        `models`: see `bucket_statements`. None: not known yet, so the statements about models stay as they are.
        """
        self._store = store
        self._admin_url = admin_url.rstrip("/")
        self._id = installation_id(store.config.bucket, installation)
        self._models = models
        self._lock = threading.Lock()  # one writer of users and policy, even if a reconcile was ended meanwhile
        how: dict[str, Any] = {"timeout": urllib3.Timeout(connect=5, read=10), "ca_certs": store.config.ca_file}
        # As boto3 does for the store. urllib3 does not read the environment.
        proxy = get_environ_proxies(self._admin_url).get(self._admin_url.partition("://")[0])
        self._http = urllib3.ProxyManager(proxy, **how) if proxy else urllib3.PoolManager(**how)

    def draw(self, tenant: str) -> StorageConfig:
        """Return a new key for a tenant, which works after `accept`."""
        return self.key(tenant, self.user(tenant), secrets.token_urlsafe(30))

    def key(self, tenant: str, user: str, secret: str) -> StorageConfig:
        """Return the address of the tenant's part of the bucket, with the key of a user."""
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

    def works(self, tenant: str, user: str, secret: str) -> bool:
        """Return whether a key is the tenant's own, and the store accepts it. Raises StoreError without an answer."""
        if user != self.user(tenant) and user != self._recorded().get(tenant):
            return False
        store = S3Store(self.key(tenant, user, secret), attempts=2, timeout=TRIAL)
        try:
            next(store.objects(tenant_prefix(tenant)), None)
        except StoreError as error:
            if error.trouble != "denied":
                raise
            return False
        return True

    def accept(self, tenant: str, secret: str) -> None:
        """Let the key with this secret work, which the tenant can read by now. A user that exists keeps its secret."""
        user = self.user(tenant)
        with self._lock:
            if user not in self.users():
                account = (
                    f"<Account><Access>{user}</Access><Secret>{escape(secret)}</Secret><Role>user</Role></Account>"
                )
                self._admin("/create-user", account, done=409)
            self._write(self._recorded() | {tenant: user})

    def revoke(self, tenant: str) -> None:
        """Delete a tenant's key. It is no error if the tenant has none."""
        with self._lock:
            self._remove(tenant)

    def has_key(self, tenant: str) -> bool:
        """Return whether a tenant has a key that was accepted: a user, and its rights."""
        user = self._recorded().get(tenant)
        allowed = [item for item in self._policy().get("Statement", []) if user in _principals(item)]
        return any(str(item.get("Sid", "")).endswith(f"Own{tenant}") for item in allowed)

    def tenants(self) -> set[str]:
        """Return the tenants that have a key of this installation."""
        return set(self._recorded())

    def allow(self, models: Readers) -> None:
        """Let tenants read base models. `models`: see `bucket_statements`. Nothing is written if nothing changed."""
        with self._lock:
            self._models = models
            self._write(self._recorded())

    def users(self) -> set[str]:
        """Return all users of the store, including those that other programs have made."""
        root = ET.fromstring(self._admin(USERS) or b"<none/>")  # noqa: S314 - our own store's answer
        return {element.text or "" for element in root.iter() if element.tag.rpartition("}")[2] == "Access"}

    def user(self, tenant: str) -> str:
        """Return the name of a tenant's user, which is also the ID of its key."""
        return f"{USER_PREFIX}{self._id}-{tenant}"

    def _recorded(self) -> dict[str, str]:
        """Return the users of this installation by tenant: by their names, or because this bucket's policy records them."""
        there, prefix = self.users(), self.user("")
        named = {user.removeprefix(prefix): user for user in there if user.startswith(prefix)}
        return recorded(self._policy(), MARK + self._id, there) | named

    def _remove(self, tenant: str) -> None:
        """Delete the tenant's user, and remove its rights. Delete its users of earlier versions without ids, too.

        The user is deleted first. So the store tells a pod that still has the key that the key is unknown, and never that
        it lacks a right: the pod then waits for its next key.
        """
        records = self._recorded()
        before = records.pop(tenant, None)
        there = self.users() - {self._store.config.access_key_id}
        if (own := self.user(tenant)) in there:
            self._admin(f"/delete-user?access={quote(own)}", done=404)
        self._write(records)
        for user in {before or ""} & there - {own}:
            if (other := self._named_elsewhere(user)) is not None:
                # Its name does not say which installation made it.
                log.warning(
                    "the user %s lost its rights here and stays, because the policy of bucket %s names it", user, other
                )
                continue
            self._admin(f"/delete-user?access={quote(user)}", done=404)

    def _named_elsewhere(self, user: str) -> str | None:
        """Return another bucket of the store whose policy names the user, or None."""
        try:
            buckets = [str(item["Name"]) for item in self._store.client.list_buckets().get("Buckets", [])]
        except Exception as error:
            raise _unavailable(error, "cannot list the buckets of the store") from error
        for bucket in buckets:
            if bucket == self._store.config.bucket:
                continue
            if any(user in _principals(item) for item in self._policy(bucket).get("Statement", [])):
                return bucket
        return None

    def _write(self, users: Mapping[str, str]) -> None:
        """Write the statements of these users, by tenant, into the bucket's policy if they differ from the present ones."""
        policy, bucket = self._policy(), self._store.config.bucket
        there = policy.get("Statement", [])
        kept = [item for item in there if not is_own(item, self._id)]
        models = self._models
        if models is None and any(str(item.get("Sid")) == LEGACY_MODELS for item in there):
            models = ALL_MODELS  # as the previous version of Graft wrote it
        statements = kept + bucket_statements(bucket, users, models or {}, MARK + self._id)
        if models is None:
            statements += models_of(there, MARK + self._id, self.users())
        if statements == there:
            return
        text = json.dumps({"Version": "2012-10-17", "Statement": statements}, separators=(",", ":"))
        client = self._store.client
        try:
            if statements:
                client.put_bucket_policy(Bucket=bucket, Policy=text)
            elif policy:
                client.delete_bucket_policy(Bucket=bucket)
        except Exception as error:
            size = f"{len(text)} bytes for {len(users)} namespaces"
            raise _unavailable(error, f"cannot change the bucket policy of {bucket} ({size})") from error
        if len(text) > POLICY_LIMIT:
            log.warning(
                "the bucket policy of %s has %d bytes for %d namespaces. S3 allows %d; this store accepted it",
                bucket, len(text), len(users), POLICY_LIMIT,
            )  # fmt: skip

    def _policy(self, bucket: str | None = None) -> dict[str, Any]:
        bucket = bucket or self._store.config.bucket
        try:
            answer = self._store.client.get_bucket_policy(Bucket=bucket)
        except Exception as error:
            if "NoSuchBucketPolicy" in str(error):
                return {}
            raise _unavailable(error, f"cannot read the bucket policy of {bucket}") from error
        return dict(json.loads(answer["Policy"]))

    def _admin(self, path: str, body: str = "", done: int = 200) -> bytes:
        """Call the identity service. `done`: the status that it answers if the change was made before."""
        try:
            try:
                answer = self._send(path, body)
            except urllib3.exceptions.ProtocolError:  # the connection broke off, so the change may have been made
                answer = self._send(path, body)
        except urllib3.exceptions.HTTPError as error:
            raise StoreError(
                "unavailable", f"cannot call the identity service {self._admin_url}: {error}", answered=False
            ) from error
        if answer.status >= 300 and answer.status != done:
            trouble: Trouble = "denied" if answer.status in {401, 403} else "unavailable"
            raise StoreError(
                trouble,
                f"the identity service answered {answer.status} to {path.split('?')[0]}: {answer.data[:300]!r}",
            )
        return answer.data

    def _send(self, path: str, body: str) -> urllib3.BaseHTTPResponse:
        if path != USERS and not self._store.may_write():
            raise StoreError("unavailable", "another operator leads now, so this one writes nothing")
        own = self._store.config
        request = AWSRequest(method="PATCH", url=self._admin_url + path, data=body.encode())
        S3SigV4Auth(Credentials(own.access_key_id, own.secret_access_key), "s3", own.region).add_auth(request)
        prepared = request.prepare()
        return self._http.request("PATCH", prepared.url, headers=dict(prepared.headers), body=body.encode(), retries=2)


def _unavailable(error: Exception, what: str) -> StoreError:
    return StoreError("unavailable", f"{what}: {error}", answered=not isinstance(error, BotoCoreError))


def bucket_statements(bucket: str, users: Mapping[str, str], models: Readers, mark: str) -> list[Statement]:
    """Return the policy statements of the tenants' users (PURE).

    `users`: tenant -> its user. `models`: prefix of a base model -> the tenants that may read it. `mark`: the beginning of
    all Sids. Each user may read and write below its own prefix, but not write below its adapters/: the operator publishes.
    It may delete only below its runs/, and read and list the base models that its tenant may use. Models with the same
    readers share their statements.
    """
    arn = f"arn:aws:s3:::{bucket}"
    statements: list[Statement] = []
    for tenant, user in sorted(users.items()):
        prefix = tenant_prefix(tenant)
        data = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
        statements += [
            _allow(f"{mark}Own{tenant}", [user], data, [f"{arn}/{prefix}*"]),
            # To delete staged files and old checkpoints.
            _allow(f"{mark}Runs{tenant}", [user], ["s3:DeleteObject"], [f"{arn}/{prefix}runs/*"]),
            _allow_list(f"{mark}List{tenant}", [user], arn, [prefix]),
        ]
    if users:
        versions = [f"{arn}/{tenant_prefix(tenant)}{VERSIONS}*" for tenant in sorted(users)]
        # One statement for all: a user may write below its own prefix only.
        writes = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:DeleteObject"]
        own = [users[tenant] for tenant in sorted(users)]
        statements.append(_allow(f"{mark}Published", own, writes, versions) | {"Effect": "Deny"})
    readers: dict[tuple[str, ...], list[str]] = {}
    for prefix, tenants in sorted(models.items()):
        able = tuple(sorted(set(users) - tenants.tenants if isinstance(tenants, AllBut) else set(tenants) & set(users)))
        if able:
            readers.setdefault(able, []).append(prefix)
    for number, (able, prefixes) in enumerate(sorted(readers.items())):
        who = [users[tenant] for tenant in able]
        objects = [f"{arn}/{prefix}*" for prefix in prefixes]
        statements += [
            _allow(f"{mark}Models{number}", who, ["s3:GetObject"], objects),
            _allow_list(f"{mark}ModelsList{number}", who, arn, prefixes),
        ]
    return statements


def _allow(sid: str, users: list[str], actions: list[str], resources: list[str]) -> Statement:
    allowed = {"Sid": sid, "Effect": "Allow", "Principal": {"AWS": users}}
    return allowed | {"Action": actions, "Resource": resources}


def _allow_list(sid: str, users: list[str], arn: str, prefixes: Iterable[str]) -> Statement:
    below = {"StringLike": {"s3:prefix": [f"{prefix}*" for prefix in prefixes]}}
    return _allow(sid, users, ["s3:ListBucket"], [arn]) | {"Condition": below}


def is_own(statement: Statement, installation: str) -> bool:
    """Return whether this installation writes a statement: its id is in the Sid, or an earlier version without ids
    wrote it (PURE).
    """
    sid = str(statement.get("Sid", ""))
    return sid.startswith(MARK + installation) or LEGACY.fullmatch(sid) is not None


def recorded(policy: Mapping[str, Any], mark: str, there: Collection[str]) -> dict[str, str]:
    """Return the users without an id in their name that a bucket's policy records as this installation's, by tenant
    (PURE).

    Users that do not exist are left out: another installation may have deleted them.
    """
    found = {}
    for item in policy.get("Statement", []):
        sid = str(item.get("Sid", ""))
        legacy = LEGACY.fullmatch(sid)
        if legacy is not None and legacy[1] == "Own":
            tenant = legacy[2]
        elif sid.startswith(f"{mark}Own"):
            tenant = sid.removeprefix(f"{mark}Own")
        else:
            continue
        user = USER_PREFIX + tenant
        if user in there and user in _principals(item):
            found[tenant] = user
    return found


def models_of(statements: Iterable[Statement], mark: str, there: Collection[str]) -> list[Statement]:
    """Return an installation's statements about base models, without users that do not exist (PURE)."""
    found = []
    for item in statements:
        users = [user for user in _principals(item) if user in there]
        if users and str(item.get("Sid", "")).startswith(f"{mark}Models"):
            found.append(item | {"Principal": {"AWS": users}})
    return found


def _principals(statement: Statement) -> list[str]:
    """Return the users that a statement names, in the notations of S3's policies."""
    principal = statement.get("Principal")
    named = principal.get("AWS", []) if isinstance(principal, dict) else principal
    return [str(item) for item in named] if isinstance(named, list) else [str(named)] if named else []
