"""Signatures of published versions: Ed25519 (RFC 8032) over a statement about a verified version (PURE).

A statement says: this version of this adapter, in this namespace, is at this URI, and its manifest.json has this
digest. Its bytes are a prefix that no other use of the key shares, followed by JSON with sorted keys.
docs/signatures.md describes the format. The manifest holds the digest of every file, so one signature covers all files.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from graft.api.adapter import AdapterSignature

DOMAIN = b"graft.dev/adapter-signature/v1\n"
PRIVATE, PUBLIC = ".key", ".pub"  # endings of the Secret's entries
PUBLIC_BYTES = 32


class KeysInvalid(Exception):
    """The Secret's keys are invalid. The message names the entry, never its content."""


class SignatureInvalid(Exception):
    """The signature does not match the statement."""


class KeyUnknown(SignatureInvalid):
    """None of the trusted keys made the signature."""


@dataclass(frozen=True)
class Statement:
    """The content of a signature."""

    namespace: str  # of the Adapter
    adapter: str
    version: str
    uri: str  # s3://bucket/prefix/ of the version
    digest: str  # sha256:… of manifest.json

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        return DOMAIN + json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Keys:
    """The operator's keys. One key signs, all keys verify."""

    key_id: str  # of the key that signs
    public: Mapping[str, bytes]  # key id -> raw public key
    private: Ed25519PrivateKey = field(repr=False, compare=False)


def generate() -> bytes:
    """Return a new private key in PKCS#8 and PEM, as `openssl genpkey -algorithm ed25519` writes it."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_id(public: bytes) -> str:
    """Return the id of a raw public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def read_keys(entries: Mapping[str, bytes]) -> Keys:
    """Read the keys of a Secret: entries *.key (PKCS#8) and *.pub (SubjectPublicKeyInfo), both in PEM.

    The last *.key in the order of the names signs. Raises KeysInvalid.
    """
    public: dict[str, bytes] = {}
    signing: Ed25519PrivateKey | None = None
    for name in sorted(entries):
        if name.endswith(PRIVATE):
            signing = _private(name, entries[name])
            raw = _raw(signing.public_key())
            public[key_id(raw)] = raw
        elif name.endswith(PUBLIC):
            public |= read_public(name, entries[name])
    if signing is None:
        raise KeysInvalid(f"no entry has a name that ends with {PRIVATE}")
    return Keys(key_id(_raw(signing.public_key())), public, signing)


def _private(name: str, pem: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # the parser's own message may quote parts of the key
    if not isinstance(key, Ed25519PrivateKey):
        raise KeysInvalid(f"{name} is not an Ed25519 private key in PEM without a password")
    return key


def read_public(name: str, pem: bytes) -> dict[str, bytes]:
    """Read a public key in PEM (SubjectPublicKeyInfo).

    Return key id -> raw key. Raises KeysInvalid, which names the file or entry.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise KeysInvalid(f"{name} is not an Ed25519 public key in PEM")
    raw = _raw(key)
    return {key_id(raw): raw}


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(keys: Keys, statement: Statement) -> AdapterSignature:
    """Sign the statement with the current key. The same statement always gives the same signature."""
    value = keys.private.sign(statement.to_bytes())
    return AdapterSignature(key_id=keys.key_id, value=base64.b64encode(value).decode())


def verify(signature: AdapterSignature, statement: Statement, trusted: Mapping[str, bytes]) -> None:
    """Check that a trusted key (key id -> raw public key) signed the statement.

    Raises KeyUnknown or SignatureInvalid.
    """
    raw = trusted.get(signature.key_id)
    if raw is None:
        raise KeyUnknown(f"the key {signature.key_id[:16]} made the signature, and this key is not trusted")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(
            base64.b64decode(signature.value, validate=True), statement.to_bytes()
        )
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise SignatureInvalid(
            f"the signature by {signature.key_id} does not match {statement.adapter} {statement.version} in namespace "
            f"{statement.namespace} with {statement.digest} at {statement.uri}"
        ) from error


def published_keys(public: Mapping[str, bytes]) -> dict[str, str]:
    """Return public keys as the data of a ConfigMap."""
    return {name: base64.b64encode(raw).decode() for name, raw in sorted(public.items())}


def trusted_keys(data: Mapping[str, str]) -> dict[str, bytes]:
    """Read the data that published_keys wrote.

    Skip entries that are not a key, or whose name is not the id of their key.
    """
    found = {}
    for name, text in data.items():
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue
        if len(raw) == PUBLIC_BYTES and key_id(raw) == name:
            found[name] = raw
    return found


def document(statement: Statement, signature: AdapterSignature) -> bytes:
    """Return manifest.sig.json: the statement and its signature, for readers that can access only the bucket."""
    content: dict[str, Any] = {"schemaVersion": 1, "statement": asdict(statement), **signature.wire()}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
