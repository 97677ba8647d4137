"""Between operator and gateway: which keys of clients are accepted, and for which models (PURE).

A key has 256 random bits, so its SHA-256 is no secret, and needs no salt. Only the sum leaves the Secret of the namespace.
"""

import re
from typing import Annotated, ClassVar

from pydantic import Field

from graft.bounded import Limits
from graft.contracts.enginekeys import Fingerprint, new_key
from graft.contracts.message import CONFIGMAP, Message, Name, Real, Whole
from graft.contracts.usage import Allowance

API_KEYS_SECRET = "graft-api-keys"  # noqa: S105 - the name of the Secret with the keys of a namespace, one entry each
API_KEY_COMPONENT = "api-key"
GRANT_KEY = "grant.json"
STATE = ".state"  # suffix of the entry that says since when a key is there
PREFIX = "graft_"  # so that scanners of secrets find a key in a repository
KEY = re.compile(r"graft_[A-Za-z0-9_-]{43}")
MOST_ACCEPTED = 8


def new_api_key() -> str:
    """Return a new key."""
    return PREFIX + new_key()


class Accepted(Message):
    """One key that is accepted."""

    sha256: Fingerprint
    until: Real | None = None  # seconds since 1970; None: until the grant expires


class Grant(Message):
    """What the keys of one ApiKey open."""

    limits: ClassVar[Limits] = Limits(CONFIGMAP, depth=4, values=10_000)

    schema_version: Whole = 1
    namespace: Name
    name: Name  # of the ApiKey
    keys: Annotated[list[Accepted], Field(max_length=MOST_ACCEPTED)]
    models: list[Name] | None = None  # full names, <namespace>/<route>; None: all of the namespace
    expires: Real | None = None  # seconds since 1970
    end_streams: bool = False  # whether running answers end with the key
    allowance: Allowance | None = None  # what the keys may use together; None: no limits
    tenant: Name | None = None  # which has the namespace
    tenant_allowance: Allowance | None = None  # what all keys of the tenant may use together


class KeyState(Message):
    """How long a key has been in its Secret, and which one was there before. It is beside the key."""

    rotation: Whole
    since: Name  # a time, in the format of status.now()
    previous: Fingerprint | None = None  # of the key before the last rotation
    previous_until: Name | None = None
